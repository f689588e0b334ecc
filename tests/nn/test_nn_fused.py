from dataclasses import replace

import pytest
import torch

from accessory.config import PRESETS
from accessory.formats import FORMATS
from accessory.nn.decoder import Decoder, init_weights
from accessory.nn.fused import FusedWeights
from accessory.nn.linear import PackedWeight
from accessory.ops.quantized import dequantize, quantize


@pytest.fixture(params=["base", "sparse"])
def decoder(request):
    decoder = Decoder(PRESETS["tiny"], request.param).requires_grad_(False)
    init_weights(decoder, std=0.2)
    return decoder


def test_joining_keeps_names_values_and_results(decoder):
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    token = torch.tensor([[7]])
    with torch.no_grad():
        expected = decoder(token).logits
        decoder.fuse()
        assert decoder.layers[0].attention.fused.tensor is not None
        torch.testing.assert_close(decoder(token).logits, expected)
    after = decoder.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_values_written_later_show_in_the_joined_product(decoder):
    decoder.fuse()
    with torch.no_grad():
        decoder.layers[0].attention.wv.weight.zero_()
        decoder.layers[0].feed_forward.experts.w3.zero_()
    n = decoder.args.n_kv_heads * decoder.args.head_dim
    assert decoder.layers[0].attention.fused.tensor[-n:].abs().sum() == 0
    assert decoder.layers[0].feed_forward.experts.fused.tensor[:, decoder.args.hidden_dim :].abs().sum() == 0


def test_a_replaced_or_cast_weight_is_joined_anew(decoder):
    decoder.fuse()
    attention = decoder.layers[0].attention
    attention.wk.weight = torch.nn.Parameter(torch.ones_like(attention.wk.weight), requires_grad=False)
    decoder.fuse()
    n = decoder.args.n_heads * decoder.args.head_dim
    assert attention.fused.tensor[n : n + 4].eq(1).all()
    decoder.to(torch.bfloat16).fuse()
    assert attention.fused.tensor.dtype == torch.bfloat16


def test_what_learns_is_never_joined(decoder):
    decoder.fuse()
    decoder.requires_grad_(True).fuse()
    assert decoder.layers[0].attention.fused.tensor is None


def quantized(weight, format):
    """The weight of a format, with random numbers."""
    packed = quantize(torch.randn(weight.shape) * 0.1, format)
    module = PackedWeight(format, tuple(weight.shape), "cpu")
    for name, tensor in packed.tensors().items():
        module.get_parameter(name).data = tensor
    return module


@pytest.mark.parametrize("format", FORMATS)
def test_quantized_weights_are_joined_too(format):
    """Both places: q, k and v of attention, and w1 and w3 of experts, with the results of the weights apart."""
    args = replace(PRESETS["tiny"], dim=256, hidden_dim=256, head_dim=64, n_heads=4, n_kv_heads=2)
    decoder = Decoder(args, "base").requires_grad_(False)
    init_weights(decoder, std=0.1)
    attention, experts = decoder.layers[0].attention, decoder.layers[0].feed_forward.experts
    places = [(linear, "weight") for linear in (attention.wq, attention.wk, attention.wv)]
    for module, name in [*places, *((experts, kind) for kind in ("w1", "w2", "w3"))]:
        weight = getattr(module, name)
        delattr(module, name)
        setattr(module, name, quantized(weight, format))
    decoder.compute_in(torch.float32)
    tokens, before = torch.tensor([[7]]), {k: v.clone() for k, v in decoder.state_dict().items()}
    with torch.no_grad():
        expected = decoder(tokens).logits
        for _ in range(2):
            decoder.fuse()
            assert experts.fused.tensor.format == attention.fused.tensor.format == format
            torch.testing.assert_close(decoder(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        parts = [dequantize(experts.w1.packed()), dequantize(experts.w3.packed())]
        assert torch.equal(dequantize(experts.fused.tensor), torch.cat(parts, 1))
        assert experts.w1.data.data_ptr() == experts.fused.tensor.data.data_ptr()  # views, not copies
    after = decoder.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_weights_of_two_formats_are_not_joined(decoder):
    experts = decoder.layers[0].feed_forward.experts
    fused, like = FusedWeights(dim=0), torch.empty(8, 128)
    fused.refresh([quantized(like, "int8"), quantized(like, "int8")])
    assert fused.tensor.shape == (16, 128)
    fused.refresh([quantized(like, "int8"), quantized(like, "int4")])
    assert fused.tensor is None
    fused.refresh([quantized(like, "int8"), experts.w1])
    assert fused.tensor is None
