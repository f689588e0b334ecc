import pytest
import torch

from accessory.config import PRESETS
from accessory.nn.decoder import Decoder, init_weights


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
