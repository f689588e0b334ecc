"""The experts' feed-forward in tiles against the dense definition, in every format: on a GPU, or interpreted."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from helpers.interpreted import interpret, others_slow, relative

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")

FORMATS = ["dense", "int8", "fp8", "int4", "nf4", "nf4-dq"]
# (tokens, dim, hidden dim, experts in all, experts here, first, experts a token): idle experts, other ranks' experts,
# one expert for all, sizes that are no multiple of a tile.
CASES = [
    (1, 128, 256, 4, 4, 0, 2),
    (1, 128, 256, 8, 4, 4, 5),
    (9, 384, 128, 8, 4, 4, 2),
    (40, 128, 384, 3, 2, 1, 3),
    (21, 256, 128, 8, 8, 0, 1),
]
LARGE = [(T, 512, 768, 8, 8, 0, 2) for T in (1, 2, 3, 4, 16, 64, 100, 256, 512)] + [(64, 256, 512, 8, 4, 4, 2)]


def make(format, case, device, dtype):
    from accessory.ops.linear import Weight
    from accessory.ops.quantized import dequantize, quantize

    T, D, F, experts, E, first, K = case
    g = torch.Generator().manual_seed(T + D)
    x_TD = torch.randn(T, D, generator=g).to(dtype)
    stacks = [torch.randn(E, *size, generator=g) * 0.1 for size in ((F, D), (D, F), (F, D))]
    expert_TK = torch.stack([torch.randperm(experts, generator=g)[:K] for _ in range(T)])
    if T == 21:
        expert_TK[:] = 2  # one expert has all tokens
    weight_TK = torch.rand(T, K, generator=g)
    if format == "dense":
        stacks = [w.to(dtype) for w in stacks]
        dense = stacks
    else:
        stacks = [quantize(w, format) for w in stacks]
        dense = [dequantize(w, torch.float32) for w in stacks]
    there = [w.to(device) if format == "dense" else w.map(lambda t: t.to(device)) for w in stacks]
    want_TD = torch.zeros(T, D, dtype=torch.float64)
    w1, w2, w3 = (w.double() for w in dense)
    for t, k in torch.cartesian_prod(torch.arange(T), torch.arange(K)).tolist():
        e = int(expert_TK[t, k]) - first
        if 0 <= e < E:
            x_D = x_TD[t].double()
            h_F = torch.nn.functional.silu(w1[e] @ x_D) * (w3[e] @ x_D)
            want_TD[t] += weight_TK[t, k].double() * (w2[e] @ h_F)
    weights = [Weight(w) for w in there]
    return (x_TD.to(device), *weights, weight_TK.to(device), expert_TK.to(device), first), want_TD


def check(format, case, device, dtype, bound, sizes=None):
    """sizes: of a tile, as in `NAMES`, instead of the tables' own."""
    from accessory.ops.triton import grouped_experts as kernels

    inputs, want_TD = make(format, case, device, dtype)
    tile = sizes and dict(zip(kernels.NAMES, sizes, strict=True))
    with patch.object(kernels, "_tile", lambda *_: dict(tile)) if tile else nullcontext():
        poison(device)
        got_TD = kernels.experts_in_tiles(*inputs)
        assert got_TD.dtype == torch.float32
        assert relative(got_TD, want_TD) <= bound
        if format != "dense":
            from accessory.ops.quantized import dequantize

            p = inputs[1].weight[0]
            poison(device)
            want_TO = inputs[0].double() @ dequantize(p, torch.float32).double().T
            assert relative(kernels.linear(inputs[0], p), want_TO) <= bound


def poison(device):
    """Fill memory that the next tensors will get with NaN."""
    if device == "cuda":
        torch.full((2**24,), torch.nan, device=device)


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_in_tiles_on_the_gpu(format, case, dtype):
    # h is rounded to 16 bits. nf4's values are too, and a single weight's product.
    check(format, case, device="cuda", dtype=dtype, bound=4e-3 if dtype == torch.bfloat16 else 8e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
@pytest.mark.parametrize("format", others_slow(FORMATS, "dense", "int8", "int4"))
def test_in_tiles_in_the_interpreter(format):
    how = "device='cpu', dtype=torch.float32, bound=1e-6"
    interpret(__file__, f"for case in t.CASES: t.check({format!r}, case, {how})")


# Tiles of rows that are no power of two. Experts of 16 rows and fewer, of some more, and of more than one tile has.
MORE = [(16, 64, 64, 1, True, 1, 4, 3, 16), (16, 64, 128, 1, True, 1, 4, 3, 8)]


@pytest.mark.parametrize(
    "sizes", [*MORE, (64, 64, 64, 1, True, 1, 4, 3, 16), (128, 128, 64, 1, True, 1, 8, 3, 32)], ids=str
)
@pytest.mark.parametrize("format", ["dense", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tiles_with_more_rows_on_the_gpu(format, sizes, dtype):
    for case in (*CASES, *LARGE[5:]):
        check(format, case, "cuda", dtype, 4e-3 if dtype == torch.bfloat16 else 8e-4, sizes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
@pytest.mark.parametrize("format", others_slow(["dense", "int8", "fp8"], "int8"))
def test_tiles_with_more_rows_in_the_interpreter(format):
    how = "device='cpu', dtype=torch.float32, bound=1e-6"
    interpret(
        __file__, f"for sizes in t.MORE:\n  for case in t.CASES[2:]: t.check({format!r}, case, {how}, sizes=sizes)"
    )


@pytest.mark.parametrize("format", ["none", "int4"])
def test_a_measured_tile_is_cut_to_the_weight_as_any_other(format, monkeypatch):
    """A table is made at one model's sizes, and serves others: smaller ones, and ones with an odd number of groups."""
    from accessory.ops.quantized import quantize
    from accessory.ops.triton import grouped_experts as kernels

    asked = []
    large = dict(zip(kernels.NAMES, (32, 256, 0 if format == "int4" else 512, 4, False, 1, 8, 5), strict=False))
    monkeypatch.setattr(kernels, "measured_on", lambda *question: asked.append(question) or dict(large))
    dense = torch.randn(2, 40, 384)
    weight = dense.bfloat16() if format == "none" else quantize(dense, format)
    tile = kernels._tile(kernels.UP, weight, 7.5, shared=100_000)
    assert asked == [(dense.device, "experts_up", format, 40, 384, 7.5)]
    assert (tile["M"], tile["P"], tile["num_warps"]) == (32, 64, 8)
    assert tile["MORE"] == 0  # a table may be older than this name
    assert tile["UNROLL"] == (1 if format == "int4" else 4)  # three groups
    assert tile["num_stages"] == (5 if format == "int4" else 2)
