"""The grouped product of dense stacks against a product of each row: on a GPU, or interpreted in fp32."""

import pytest
import torch
from helpers.interpreted import interpret, relative

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")

# (out, in, rows of each expert, rows of other ranks' experts): unequal and idle experts, one expert, more rows than a
# tile, sizes that are no multiple of a tile, LoRA's ranks, and nothing at all for this rank.
CASES = [
    (40, 100, (5, 0, 20), 0),
    (70, 33, (3,), 4),
    (96, 128, (0, 0, 1, 0), 2),
    (130, 64, (70, 3, 0, 0, 18), 9),
    (4, 200, (2, 1), 1),
    (48, 4, (7, 0, 40), 0),
    (16, 16, (0, 0), 3),
]


def problem(case, device, dtype):
    O, I, counts, others = case  # noqa: E741
    g = torch.Generator().manual_seed(O + len(counts))
    w = (torch.randn(len(counts), O, I, generator=g) * 0.2).to(dtype)
    x = torch.randn(sum(counts) + others, I, generator=g).to(dtype)
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    want = torch.stack([x[n].double() @ w[e].double().T for n, e in enumerate(expert)]) if sum(counts) else None
    return x.to(device), w.to(device), torch.tensor(counts, device=device), want


def check(case, device, dtype, bound):
    from accessory.ops.triton.grouped import TILES_16_BITS, TILES_32_BITS, product, tile_of

    x, w, count, want = problem(case, device, dtype)
    assert product(x, w, count).shape == (len(x), w.shape[1])
    if want is None:
        return
    held = len(want)
    # The sizes choose one tile of the tables. Every other must compute the same.
    tables = {**TILES_16_BITS, -1: TILES_32_BITS[12], -2: TILES_32_BITS[2**62]}
    for sizes in tables.values():
        assert relative(product(x, w, count, tile=tile_of(sizes, *w.shape[1:]))[:held], want) <= bound
    turned = w.transpose(1, 2).contiguous().transpose(1, 2)  # stored (I, O), as a product backwards reads weights
    assert relative(product(x, turned, count)[:held], want) <= bound

    # Rows are read through an index, scaled, and added to other rows.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = torch.empty_like(x)
    shuffled[order] = x
    scale = torch.linspace(-2, 2, len(x), device=device)
    assert relative(product(shuffled, w, count, from_N=order, scale_N=scale)[:held],
                    want * scale[:held, None].double().cpu()) <= bound  # fmt: skip
    before = torch.randn(len(x) + 3, w.shape[1], device=device).to(dtype)
    got, expected = before.clone(), before.double().cpu()
    expected[order[:held].cpu()] += want
    assert product(x, w, count, to_N=order, add_to=got) is got
    assert relative(got, expected) <= bound
    untouched = [n for n in range(len(before)) if n not in order[:held].tolist()]
    assert torch.equal(got[untouched], before[untouched])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 6e-4)])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_grouped_rows_on_the_gpu(case, dtype, bound):
    check(case, device="cuda", dtype=dtype, bound=bound)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
def test_grouped_rows_in_the_interpreter():
    interpret(__file__, "for case in t.CASES: t.check(case, device='cpu', dtype=torch.float32, bound=1e-6)")
