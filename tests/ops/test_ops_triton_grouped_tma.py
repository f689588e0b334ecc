"""Grouped products of many rows against products expert by expert: on a GPU with TMA, or interpreted."""

import pytest
import torch
from helpers.interpreted import interpret, relative

from accessory.ops.gradient_squares import GradientSquares

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")

# (rows of each expert, rows of other ranks, out, in): experts without rows, one row, sizes that are no multiple of a
# tile, an adapter's rank on either side.
CASES = [
    ((3, 0, 70, 1), 0, 128, 64),
    ((0, 0, 0, 5), 9, 64, 192),
    ((33, 31), 2, 192, 128),
    ((20, 13), 0, 8, 128),
    ((20, 13), 0, 128, 8),
]
LARGE = [
    ((0, 700, 3, 128, 129, 1, 512, 64), 40, 1024, 512),
    ((100, 28, 300), 0, 512, 1792),
    ((64, 200), 5, 16, 1024),
    ((64, 200), 5, 1024, 16),
    ((64, 200), 0, 320, 192),
]


def make(case, device, dtype):
    counts, others, O, I = case  # noqa: E741
    g = torch.Generator().manual_seed(O + I)

    def random(*shape):
        return (torch.randn(*shape, generator=g) * 0.3).to(dtype)

    N = sum(counts) + others
    x_NI, w_EOI, dy_NO = random(N, I), random(len(counts), O, I), random(N, O)
    return [t.to(device) for t in (x_NI, w_EOI, dy_NO, torch.tensor(counts))]


def by_expert(rows, counts):
    return rows.double().cpu().split([*counts.tolist(), len(rows) - int(counts.sum())])[:-1]


def check(case, device="cpu", dtype=torch.float32, bound=1e-6):
    from accessory.ops.triton import grouped_tma as kernels

    x, w, dy, counts = make(case, device, dtype)
    E, n = len(counts), int(counts.sum())
    want = torch.cat([a @ b.t() for a, b in zip(by_expert(x, counts), w.double().cpu(), strict=True)])
    assert relative(kernels.product(x, w, counts)[:n], want) <= bound
    want = torch.cat([a @ b for a, b in zip(by_expert(dy, counts), w.double().cpu(), strict=True)])
    assert relative(kernels.gradient(dy, w, counts)[:n], want) <= bound
    want = torch.stack([a.t() @ b for a, b in zip(by_expert(dy, counts), by_expert(x, counts), strict=True)])
    squares = GradientSquares().buffer(want.shape, torch.device(device))
    for out in (torch.float32, dtype):
        got = kernels.weight_gradient(dy, x, counts, out, squares=squares)
        assert got.dtype == out
        assert relative(got, want) <= bound
        assert float(squares.sum()) == pytest.approx(float(got.double().square().sum()), rel=1e-5)
    assert not got[counts == 0].any()
    before = torch.ones(E, dy.shape[1], x.shape[1], device=device)
    squares.zero_()
    squares[0] = 5.0  # of an expert that gets no rows, it stays
    kept = 5.0 if counts[0] == 0 else 0.0
    assert kernels.weight_gradient(dy, x, counts, torch.float32, before, squares=squares) is before
    assert relative(before - 1, want) <= max(bound, 1e-5)
    assert float(squares.sum()) - kept == pytest.approx(float(before[counts > 0].double().square().sum()), rel=1e-5)


def check_terms(device="cpu", dtype=torch.float32, bound=1e-6):
    """Two products and their parts of low rank in one launch, forward and back."""
    from accessory.ops.dense_products import Term
    from accessory.ops.triton import grouped_tma as kernels

    for back, rank, O, I in [(False, 8, 192, 128), (True, 8, 128, 192), (True, 24, 128, 64), (False, 0, 64, 64)]:  # noqa: E741
        g = torch.Generator().manual_seed(rank)
        counts, E, N = torch.tensor([5, 0, 40]), 3, 48

        def random(*shape, g=g):
            return (torch.randn(*shape, generator=g) * 0.3).to(dtype).to(device)

        terms, want = [], torch.zeros(45, O, dtype=torch.float64)
        for _ in range(2):
            weight, low = random(E, *((I, O) if back else (O, I))), random(N, rank) if rank else None
            b = random(E, *((rank, O) if back else (O, rank))) if rank else None
            terms.append(Term(random(N, I), weight, low, b))
            for rows, stack in ((terms[-1].x_NI, weight), *([(low, b)] if rank else [])):
                for e, part in enumerate(by_expert(rows, counts)):
                    w = stack[e].double().cpu()
                    at = int(counts[:e].sum())
                    want[at : at + len(part)] += part @ (w if back else w.t())
        got = kernels.sum_of_terms(counts.to(device), terms, back)
        assert relative(got[:45], want) <= bound
        one = kernels.sum_of_terms(counts.to(device), terms[:1], back)
        two = kernels.sum_of_terms(counts.to(device), terms[1:], back)
        assert relative((one + two)[:45], want) <= 2 * bound


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")


@interpreted
def test_interpreted_products_are_those_of_single_experts():
    interpret(__file__, "for case in t.CASES: t.check(case)")


@interpreted
def test_interpreted_sums_of_terms():
    interpret(__file__, "t.check_terms()")


has_tma = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not has_tma, reason="needs a GPU with TMA (compute capability 9.0)")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES + LARGE)
def test_products_on_a_gpu(case, dtype):
    check(case, "cuda", dtype, 6e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not has_tma, reason="needs a GPU with TMA (compute capability 9.0)")
def test_sums_of_terms_on_a_gpu():
    check_terms("cuda", torch.bfloat16, 6e-3)
