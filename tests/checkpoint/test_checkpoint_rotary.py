"""The order of rotary pairs: which tensors have one, and how to convert between the two orders."""

import pytest
import torch
from helpers.checkpoints import half_split
from helpers.sizes import TINY

from accessory.checkpoint.lazy import Constant
from accessory.checkpoint.rotary import rotary_from_hf, rotary_to_hf, to_half_split, to_interleaved
from accessory.errors import CheckpointError


def test_rotary_orders_are_inverse_and_written_out():
    rows = torch.arange(8.0).view(8, 1)  # one head of four pairs
    half = to_half_split(Constant(rows), 1)
    assert half.load().flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert to_interleaved(half, 1) is not half
    assert torch.equal(to_interleaved(half, 1).load(), rows)
    again = to_interleaved(Constant(half.load()), 1)
    assert torch.equal(again.load(), rows)
    two_heads = to_half_split(Constant(torch.arange(8.0)), 2)  # a bias
    assert two_heads.load().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    with pytest.raises(ValueError, match="heads"):
        to_half_split(Constant(torch.zeros(4, 3)), 3)


@pytest.mark.parametrize("part", ["weight", "lora_b.weight", "bias"])
@pytest.mark.parametrize("which", ["wq", "wk"])
def test_rows_of_queries_and_keys_change_their_order(which, part):
    heads = TINY.n_heads if which == "wq" else TINY.n_kv_heads
    shape = (heads * TINY.head_dim,) if part == "bias" else (heads * TINY.head_dim, 5)
    rows, name = torch.randn(shape), f"layers.1.attention.{which}.{part}"
    theirs = rotary_to_hf(name, Constant(rows), TINY).load()
    assert torch.equal(theirs, half_split(rows.view(len(rows), -1), heads).view(shape))
    assert not torch.equal(theirs, rows)
    assert torch.equal(rotary_from_hf(name, Constant(theirs), TINY).load(), rows)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attention.wv.weight",
        "layers.0.attention.wo.weight",
        "layers.0.attention.wq.lora_a.weight",
        "layers.0.feed_forward.experts.3.w1.weight",
        "layers.0.attention_norm.weight",
        "output.weight",
    ],
)
def test_other_tensors_stay_as_they_are(name):
    tensor = Constant(torch.randn(8, 8))
    assert rotary_from_hf(name, tensor, TINY) is tensor
    assert rotary_to_hf(name, tensor, TINY) is tensor


def test_rows_that_are_other_heads_are_refused():
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wk\.weight: \(6, 4\) does not hold \d+ heads"):
        rotary_from_hf("layers.0.attention.wk.weight", Constant(torch.zeros(6, 4)), TINY)
