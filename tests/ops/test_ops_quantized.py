"""The quantised formats against bitsandbytes and against their own definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.errors import ConfigError
from accessory.formats import FORMATS, GROUP
from accessory.ops.experts import grouped_experts
from accessory.ops.experts_autograd import trained_experts
from accessory.ops.linear import Weight, linear
from accessory.ops.quantized import Packed, dequantize, packed_shapes, quantize, unpack


def weight(rows=96, columns=256, dtype=torch.float32, seed=0):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(dtype)
    w[3] = 0  # one row is all zeros, and so is a block of another
    w[5, 64:128] = 0
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_is_bitsandbytes_bit_by_bit(dtype):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is missing (extra: dev)")
    w = weight(dtype=dtype)
    theirs, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=64)
    ours = quantize(w, "nf4")
    assert torch.equal(ours.data.flatten(), theirs.flatten())
    assert torch.equal(ours.scale.flatten(), state.absmax.float().flatten())
    assert torch.equal(dequantize(ours, dtype), functional.dequantize_4bit(theirs, state))


def test_int8_is_bitsandbytes():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: dev)")
    w = weight(dtype=torch.float16)
    theirs, largest, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(w, 0.0)
    ours = quantize(w, "int8")
    assert torch.equal(ours.data, theirs)
    torch.testing.assert_close(ours.scale, largest.float() / 127, rtol=1e-6, atol=0)


# The bounds are half the distance between neighbouring values, relative to the row's or group's largest magnitude.
@pytest.mark.parametrize(("format", "bound"), [("int8", 0.5 / 127), ("fp8", 1 / 16), ("int4", 1 / 14), ("nf4", 0.152)])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-4, 1e3), shift=st.floats(-2, 2))
def test_no_number_is_further_off_than_half_a_step(format, bound, seed, scale, shift):
    w = (torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)) + shift) * scale
    error = (dequantize(quantize(w, format)) - w).abs().unflatten(-1, (-1, GROUP.get(format, 256)))
    grouped = w.unflatten(-1, (-1, GROUP.get(format, 256)))
    span = grouped.amax(-1).clamp_min(0) - grouped.amin(-1).clamp_max(0) if format == "int4" else grouped.abs().amax(-1)
    # int4's stored scale and zero are rounded too: by 0.4% of the scale over 15 steps, and by 1/32 of a step.
    assert (error <= span[..., None] * bound * 1.001 + 1e-12).all()


@pytest.mark.parametrize("format", FORMATS)
def test_what_has_a_value_of_the_format_is_kept(format):
    """Quantising dequantised numbers again gives the same numbers."""
    w = dequantize(quantize(weight(), format))
    rtol = 5e-3 if format in ("int4", "nf4-dq") else 1e-6
    torch.testing.assert_close(dequantize(quantize(w, format)), w, rtol=rtol, atol=1e-9)


def test_int4_by_hand():
    """Numbers -7 … 8 in steps of 1: scale 1, zero point 7, the codes 0 … 15 in turn."""
    w = torch.arange(-7, 9).repeat(8).float()[None]
    packed = quantize(w, "int4")
    assert packed.scale.tolist() == [[1.0]]
    assert packed.zero.tolist() == [[7 * 16]]
    assert unpack(packed.data)[0, :16].tolist() == list(range(16))
    assert packed.data[0, 0].item() == 0 * 16 + 1  # the even number in the high half
    assert torch.equal(dequantize(packed), w)


@pytest.mark.parametrize("format", FORMATS)
def test_a_cut_of_the_quantized_is_the_quantized_cut(format):
    w = weight(columns=512)
    packed = quantize(w, format)
    assert torch.equal(dequantize(packed.narrow(0, 10, 20)), dequantize(packed)[10:30])
    assert torch.equal(dequantize(packed.narrow(1, 128, 256)), dequantize(packed)[:, 128:384])
    if format != "nf4-dq":  # nf4-dq subtracts the mean of all scales, so a part quantises differently
        assert torch.equal(dequantize(packed.narrow(0, 10, 20)), dequantize(quantize(w[10:30], format)))
    if format in ("int4", "nf4"):
        assert torch.equal(dequantize(packed.narrow(1, 128, 256)), dequantize(quantize(w[:, 128:384], format)))


@pytest.mark.parametrize("format", FORMATS)
def test_shapes_and_bytes_are_as_announced(format):
    packed = quantize(torch.randn(3, 8, 256), format)
    assert packed.shape == (3, 8, 256)
    for name, (shape, dtype) in packed_shapes(format, (3, 8, 256)).items():
        tensor = packed.tensors()[name]
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    per_number = {"int8": 1 + 4 / 256, "fp8": 1 + 4 / 256, "int4": 0.5 + 3 / 128, "nf4": 0.5 + 4 / 64}
    per_number["nf4-dq"] = 0.5 + 1 / 64 + 2 * 4 / 256
    assert packed.nbytes == 3 * 8 * 256 * per_number[format]


@pytest.mark.parametrize(("format", "columns"), [("int4", 192), ("nf4", 96), ("nf4-dq", 96)])
def test_rows_without_whole_groups_are_refused(format, columns):
    with pytest.raises(ConfigError, match=f"{format} scales {GROUP[format]} numbers together"):
        quantize(torch.randn(4, columns), format)
    with pytest.raises(ConfigError, match="fewer ranks"):
        quantize(torch.randn(4, 256), format).narrow(1, 0, GROUP[format] // 2)


@pytest.mark.parametrize("format", FORMATS)
def test_products_are_those_of_the_dequantized_weight(format):
    w, x = quantize(weight(), format), torch.randn(5, 256, requires_grad=True)
    (linear(x, w) * 2).sum().backward()
    torch.testing.assert_close(linear(x, w), x @ dequantize(w).T)
    torch.testing.assert_close(x.grad, 2 * dequantize(w).sum(0).expand(5, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_grouped_products_too(format):
    g = torch.Generator().manual_seed(0)
    stacks = [torch.randn(4, *s, generator=g) * 0.1 for s in ((128, 256), (256, 128), (128, 256))]
    packed = [quantize(s, format) for s in stacks]
    expert_TK = torch.tensor([[0, 2], [2, 3], [0, 3]])  # no token visits expert 1
    weight_TK = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1]])
    results = []
    for w in (packed, [dequantize(p) for p in packed]):
        x_TD = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y_TD = trained_experts(x_TD, *map(Weight, w), weight_TK, expert_TK)
        y_TD.square().sum().backward()
        results.append((y_TD.detach(), x_TD.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        y_TD = grouped_experts(x_TD, *packed, weight_TK, expert_TK)
    torch.testing.assert_close(y_TD, results[1][0], rtol=1e-5, atol=1e-6)


def test_a_stack_gives_its_weights():
    packed = quantize(torch.randn(3, 8, 128), "int4")
    assert isinstance(packed[1], Packed)
    assert torch.equal(dequantize(packed)[1], dequantize(packed[1]))


@pytest.mark.parametrize("grad", [True, False])
def test_no_rows_have_a_product_too(grad):
    """This happens on a rank of base whose experts get no token."""
    weight = quantize(torch.randn(6, 128), "int8")
    x = torch.empty(0, 128, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        assert linear(x, weight).shape == (0, 6)
        assert linear(x.view(2, 0, 128), weight).shape == (2, 0, 6)


@pytest.mark.parametrize("format", FORMATS)
def test_no_rows_have_a_product_and_a_gradient(format):
    """This happens while base trains, for an expert that no token visits."""
    x = torch.zeros(0, 256, requires_grad=True)
    y = linear(x, quantize(weight(), format))
    assert y.shape == (0, 96)
    y.sum().backward()
    assert x.grad.shape == x.shape
