"""Adapters and biases beside weights that are read in place, against merged weights: on a GPU, or interpreted."""

import pytest
import torch
from helpers.adapted import feed_forward, random_kind
from helpers.interpreted import interpret, relative

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")

SIZES = [(1, 8, 2, 0, 8), (3, 6, 2, 2, 3)]  # T, E, K, first, held
# ranks of the adapters of w1, w2 and w3, which of them have biases, whether each token names its adapter
BESIDE = {
    "LoRA": (((5,), (4,), (5,)), "", False),
    "LoRA and biases": (((16,), (3,), (2,)), "123", False),
    "biases": (((), (), ()), "12", False),
    "only w1": (((4,), (), ()), "", False),
    "only w3": (((), (), (4,)), "3", False),
    "only w2": (((), (8,), ()), "1", False),
    "several": (((4, 2, 7), (3, 3, 3), (1, 5, 2)), "2", True),
    "several with gaps": (((0, 4), (3, 0), (0, 0)), "", True),
}


def kinds_of(E, D, F, ranks, biases, dtype, generator, format=None, beside=None):
    from accessory.ops.quantized import quantize

    found = []
    for n, shape in enumerate(((F, D), (D, F), (F, D))):
        w = torch.randn(E, *shape, generator=generator) * 0.2
        w = w.to(dtype) if format is None else quantize(w, format)
        found.append(random_kind(w, ranks[n], str(n + 1) in biases, generator, beside or dtype))
    return tuple(found)


def check(size, beside, device, dtype, bound, format=None):
    """beside: a key of BESIDE."""
    from accessory.ops.triton import decode_experts, packed

    (T, E, K, first, held), (ranks, biases, several) = size, BESIDE[beside]
    D, F = (20, 26) if format is None else (128, 128)
    g = torch.Generator().manual_seed(T * 100 + E)
    # Adapters of a quantised network are fp32.
    kinds = kinds_of(E, D, F, ranks, biases, dtype, g, format, None if format is None else torch.float32)
    x, weight = torch.randn(T, D, generator=g).to(dtype), torch.rand(T, K, generator=g)
    expert = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    some = len(ranks[0]) or len(ranks[1]) or len(ranks[2])
    adapter = torch.randint(-1, some, (T,), generator=g) if several else torch.full((T,), some - 1)
    filled = [k._replace(adapters=k.adapters or [None] * some) for k in kinds]
    want = feed_forward(x, filled, weight, expert, adapter, range(first, first + held))
    if format is None:
        kernel = decode_experts.decode_experts
    else:
        kernel = packed.decode_experts
        if device == "cpu":  # the interpreter's time grows with the number of programs, not with their size
            for tiles in packed.TILES.values():
                tiles.update({name: (64, cols, warps) for name, (_, cols, warps) in tiles.items()})
    parts = [k.part(first, held, device, several) for k in kinds]
    got = kernel(
        x.to(device), *parts, weight.to(device), expert.to(device), first, adapter.to(device) if several else None
    )
    assert relative(got, want) <= bound


def check_rows(rows, entries, experts, size, device, dtype, bound):
    """`add_adapters` of rows that name their entry: row by row, and sorted for grouped products."""
    from accessory.ops.linear import AdapterRows, adapters_in_turn
    from accessory.ops.triton.low_rank import add_grouped, add_row_by_row

    O, I, rank = size  # noqa: E741
    g = torch.Generator().manual_seed(rows)
    a, b = (torch.randn(entries, *s, generator=g).to(dtype) * 0.3 for s in ((rank, I), (O, rank)))
    scale = torch.linspace(0.5, 2, entries // experts)
    x, y = (torch.randn(rows, n, generator=g).to(dtype) for n in (I, O))
    number = torch.randint(-1, entries, (rows,), generator=g)
    want = y.double()
    for n, m in enumerate(number.tolist()):
        if m >= 0:
            want[n] += scale[m // experts].double() * (b[m].double() @ (a[m].double() @ x[n].double()))
    for function in (add_row_by_row, add_grouped, adapters_in_turn):
        there = AdapterRows(number.to(device), entries)
        before = y.to(device).clone()
        got = function(before, x.to(device), a.to(device), b.to(device), scale.to(device), there)
        assert relative(got, want) <= bound, function
        assert torch.equal(got[(number < 0).to(device)].cpu(), y[number < 0])


ROWS = [(1, 3, 1, (40, 64, 4)), (9, 6, 2, (33, 100, 5)), (24, 8, 4, (64, 48, 8))]  # rows, entries, experts, O, I, r


QUANTIZED = [(f, beside) for f in ("int8", "fp8", "int4", "nf4", "nf4-dq") for beside in ("LoRA and biases", "several")]


@pytest.mark.parametrize(("format", "beside"), [*((None, beside) for beside in BESIDE), *QUANTIZED], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pairs_with_adapters_on_the_gpu(format, beside, size):
    check(size, beside, "cuda", torch.bfloat16, 4e-3, format)
    if format is None:
        check(size, beside, "cuda", torch.float16, 2e-3)


@pytest.mark.parametrize("case", ROWS, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_with_adapters_on_the_gpu(case, dtype, bound):
    check_rows(*case, device="cuda", dtype=dtype, bound=bound)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
@pytest.mark.parametrize(
    ("format", "beside"),
    [pytest.param(None, "t.BESIDE", marks=pytest.mark.slow), ("int8", "['LoRA and biases', 'several']")],
)
def test_pairs_with_adapters_in_the_interpreter(format, beside):
    interpret(__file__, f"for beside in {beside}: t.check(t.SIZES[1], beside, 'cpu', torch.float32, 3e-6, {format!r})")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
def test_rows_with_adapters_in_the_interpreter():
    interpret(__file__, "for case in t.ROWS: t.check_rows(*case, device='cpu', dtype=torch.float32, bound=1e-6)")
