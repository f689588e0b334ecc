"""nf4 with its scales in 8 bits, against bitsandbytes' own double quantisation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.ops import double_quantization
from accessory.ops.quantized import dequantize, quantize

CPU = torch.device("cpu")


def weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.fixture(scope="module")
def functional():
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is missing (extra: dev)")


def test_the_values_are_bitsandbytes(functional):
    assert torch.equal(double_quantization.values(CPU), functional.create_dynamic_map())


# Rows of 9, 64 and 224 scales: blocks of 256 end inside a row or at its end. The last two: one block that is not full.
SHAPES = [(100, 576), (512, 4096), (64, 14336), (3, 64), (1, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_bitsandbytes_bit_by_bit(functional, shape, dtype):
    w = weight(*shape).to(dtype)
    if len(w) > 5:
        w[3] = 0
        w[5, 64:128] *= 40
    theirs, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=True)
    ours = quantize(w, "nf4-dq")
    assert torch.equal(ours.data.flatten(), theirs.flatten())
    assert torch.equal(ours.scale.flatten(), state.absmax.flatten())
    assert (ours.offset == state.offset).all()
    assert torch.equal(dequantize(ours, dtype), functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_scales_that_are_all_alike(functional, value):
    w = torch.full((8, 256), value)
    _, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=True)
    ours = quantize(w, "nf4-dq")
    assert torch.equal(ours.scale.flatten(), state.absmax.flatten())
    assert torch.equal(dequantize(ours), w)


def test_each_expert_of_a_stack_is_a_matrix_of_its_own():
    stack = torch.stack([weight(16, 448, seed) * (1 + seed) for seed in range(3)])
    packed = quantize(stack, "nf4-dq")
    for e, matrix in enumerate(stack):
        alone = quantize(matrix, "nf4-dq")
        assert all(torch.equal(packed[e].tensors()[name], tensor) for name, tensor in alone.tensors().items())


@settings(max_examples=40, deadline=None)
@given(data=st.data(), groups=st.integers(1, 24), rows=st.integers(1, 40))
def test_a_cut_keeps_what_it_needs_of_the_whole(data, groups, rows):
    """Rows may have any number of scales, also more or fewer than fit blocks of 256, and may be cut anywhere."""
    packed = quantize(weight(rows, 64 * groups, seed=groups), "nf4-dq")
    want = dequantize(packed)
    for dim in data.draw(st.permutations([0, 1])):
        size = rows if dim == 0 else groups
        start = data.draw(st.integers(0, size - 1))
        length = data.draw(st.integers(1, size - start))
        scale = 64 if dim == 1 else 1
        packed = packed.narrow(dim, start * scale, length * scale)
        want = want.narrow(dim, start * scale, length * scale)
    assert torch.equal(dequantize(packed), want)


@settings(max_examples=20, deadline=None)
@given(ranks=st.sampled_from([1, 2, 4, 8, 16]), each=st.integers(1, 40))
def test_equal_cuts_have_the_shapes_of_a_matrix_of_their_size(ranks, each):
    from accessory.ops.quantized import packed_shapes

    packed = quantize(weight(4, 64 * each * ranks), "nf4-dq")
    for rank in range(ranks):
        part = packed.narrow(1, rank * each * 64, each * 64)
        wanted = packed_shapes("nf4-dq", (4, 64 * each))
        assert {n: (tuple(t.shape), t.dtype) for n, t in part.tensors().items()} == wanted


def test_codes_beside_a_search_of_all_values(functional):
    """`nearest` chooses the codes of bitsandbytes' CUDA kernels (here: its CPU code in float64).

    With on_grid=True, few codes differ, and by at most one.
    """
    x = torch.rand(64 * 256, generator=torch.Generator().manual_seed(0)) ** 3 * 2 - 1
    x[::256] = 1.0
    theirs, _ = torch.ops.bitsandbytes.quantize_blockwise(x.double(), functional.create_dynamic_map(), 256)
    assert torch.equal(double_quantization.nearest(x, on_grid=False), theirs)
    off = double_quantization.nearest(x, on_grid=True).int() - theirs.int()
    assert off.abs().max() <= 1
    assert (off != 0).float().mean() < 2e-3
