"""The planner's memory for a layer's passes, against autograd and numbers worked out by hand."""

import pytest
import torch

from accessory.nn.experts_base import BaseExperts
from accessory.nn.experts_sparse import SparseExperts
from accessory.ops.routing import route
from accessory.planner.activations import LayerSizes, LayerTraining, experts_kept, keys_seen, layer_backward, layer_kept


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", [SparseExperts, BaseExperts])
def test_what_autograd_keeps_of_experts(kind, lora, recompute):
    """Counts the float tensors kept for backward, except weights, routing, and LoRA's narrow tensors."""
    D, F, E, K, T, rank = 64, 96, 4, 2, 128, 5
    experts = kind(D, F, E)
    experts.recompute = recompute
    for name in ("w1", "w2", "w3") if lora else ():
        experts.add_lora(name, rank, 1.0)
    for name, p in experts.named_parameters():
        p.data = torch.randn(p.shape, dtype=torch.bfloat16 if lora and "lora" not in name else torch.float32) * 0.1
        p.requires_grad_(not lora or "lora" in name)
    experts.compute_dtype = torch.bfloat16
    torch.manual_seed(0)
    x_TD, logits_TE = torch.randn(T, D, requires_grad=True), torch.randn(T, E, requires_grad=True)
    weight_TK, expert_TK, _ = route(logits_TE, K)
    weights = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    node = experts(x_TD, weight_TK, expert_TK).grad_fn
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*node.saved_tensors, *(node.inner or ()), *node.kept)
        if t is not None and t.is_floating_point() and K not in t.shape and rank not in t.shape
    }
    for pointer in weights:
        kept.pop(pointer, None)
    layer = LayerSizes(T, T * K, D, F, D, D, E)
    copies = 0 if lora or recompute else 2 * 3 * layer.stack
    training = LayerTraining(weights=not lora, experts_lora=lora, recompute=recompute)
    assert sum(kept.values()) == experts_kept(layer, training) + copies


def test_a_layer_of_mixtral_by_hand():
    """One token's bytes, two experts a token, all trained."""
    D, F = 4096, 14336
    layer = LayerSizes(1, 2, D, F, D, 1024, 8)
    training = LayerTraining(weights=True, gate=True, packing=False)
    stream = 2 * 4 * D + 2 * D  # the input and the sum after attention; attention's input
    attention = 2 * (D + 1024) + 2 * 1024 + 2 * D  # queries and keys, values, the output
    experts = 4 * D + 2 * D + 2 * 2 * 2 * F  # the router's input, the experts' input, w1 x and w3 x
    assert layer_kept(layer, training) == stream + attention + experts == 200704
    again = LayerTraining(weights=True, gate=True, packing=False, recompute=True)
    assert layer_kept(layer, again) == 4 * D + 2 * D  # the layer's input and the experts'


@pytest.mark.parametrize(
    ("format", "again", "inputs", "hidden", "stacks"),
    [
        (None, False, 1, 3, 0),  # SwiGLU: dy; w1 x, w3 x and h, or their gradients
        (None, True, 2, 3, 0),  # also x, of which w1 x and w3 x are computed again
        ("nf4", False, 1, 4, 0),  # w2, dequantised tile by tile: its input's gradient is the sum of two tensors
        ("nf4", True, 2, 4, 0),  # so is w3 x, computed again
    ],
)
def test_backward_of_few_tokens_through_lora_by_hand(format, again, inputs, hidden, stacks):
    check_lora_by_hand(1, format, again, inputs, hidden, stacks)


@pytest.mark.parametrize(
    ("again", "inputs", "hidden", "stacks"),
    [
        (False, 1, 3, 1),  # w2: dy; w1 x, w3 x and dh
        (True, 2, 2, 2),  # w1 after w3, whose stack is there since w3 x was computed again: two gradients of one input
    ],
)
def test_backward_through_dequantized_stacks_by_hand(again, inputs, hidden, stacks):
    check_lora_by_hand(1040, "nf4", again, inputs, hidden, stacks)


@pytest.mark.parametrize(
    ("tokens", "format", "again", "inputs", "hidden", "piece", "stacks"),
    [
        (16384, None, False, 0.5, 2, (1, 1), 0),  # w1 x and w3 x; dy by token; of a piece dy and h
        (16384, None, True, 1.5, 0, (2, 3), 0),  # dy by token and dx; of a piece x, dy, w1 x, w3 x and h
        (16384, "nf4", False, 0.5, 2, (1, 1), 1),  # w2
        (24576, "nf4", True, 1, 2, (1, 1), 1),  # in forward, with all results
        (24577, "nf4", True, 1.5, 0, (2, 3), 3),  # 2 · (N - 16384) is above 2 · 8 · D: two stacks take less
        (65536, None, False, 2.5, 2, (0, 0), 0),  # the input's gradient: of pairs, of tokens in fp32 and in 16 bits
    ],
)
def test_backward_of_more_pairs_than_a_piece_by_hand(tokens, format, again, inputs, hidden, piece, stacks):
    check_lora_by_hand(tokens, format, again, inputs, hidden, stacks, piece)


def check_lora_by_hand(tokens, format, again, inputs, hidden, stacks, piece=(0, 0)):
    """inputs, hidden: how many tensors (N, D) and (N, F) are there, and of 16384 rows. stacks: dequantised ones."""
    D, F = 4096, 14336
    layer = LayerSizes(tokens, 2 * tokens, D, F, D, 1024, 8)
    training = LayerTraining(False, True, True, format=format, packing=False, recompute=again)
    # The layer's input, or what attention keeps: the inputs of its two norms and of its products, queries and keys,
    # values, the output. Then the experts' input.
    beside = 4 * D if again else 2 * 4 * D + 2 * D + 2 * (D + 1024) + 2 * 1024 + 2 * D
    pairs = 2 * 2 * (inputs * D + hidden * F)
    back = layer_backward(layer, training)
    rows = 2 * 16384 * (piece[0] * D + piece[1] * F)
    assert back.activations == tokens * (beside + 2 * D + pairs) + rows + stacks * 2 * layer.stack
    assert back.gradients == back.copies == 0


def test_attention_that_is_computed_again_meets_the_gradients_of_the_experts():
    """With wide heads, its backward is the largest moment. The copies of its weights are made again too."""
    layer = LayerSizes(1, 2, 64, 8, 4096, 4096, 4)
    back = layer_backward(layer, LayerTraining(weights=True, recompute=True))
    assert back.gradients == 3 * 4 * layer.stack
    assert back.copies == 2 * layer.attention


def test_exchanged_pairs_are_kept_as_they_came_and_as_they_went():
    """The input of the pairs that came, in 16 bits, and their results, in fp32; not the input of the rank's own."""
    layer = LayerSizes(4, 8, 64, 96, 64, 16, 4)
    alone, exchanged = (experts_kept(layer, LayerTraining(weights=True, exchanged=e)) for e in (False, True))
    assert exchanged - alone == 8 * 64 * (2 + 4) - 4 * 64 * 2
    # Where layers are computed again, that is there while the experts' backward runs, and not before.
    again = LayerTraining(weights=True, exchanged=True, recompute=True)
    assert experts_kept(layer, again) == 4 * 64 * 2
    assert layer_backward(layer, again).activations > exchanged


def test_ranks_that_share_rows_keep_the_keys_of_all():
    """A rank has 4 of 16 tokens: chunks r and 7 - r of 2 each, which see 2 · (r + 1) and 2 · (8 - r) keys, together 18.

    It keeps keys and values repeated for the query heads, beside what it keeps of its tokens.
    """
    layer = LayerSizes(4, 8, 64, 96, 64, 16, 4)
    alone, shared = (layer_kept(layer, LayerTraining(weights=True, context=n)) for n in (1, 4))
    assert shared - alone == 2 * (18 - 4) * 2 * 64
    assert keys_seen(layer, LayerTraining(weights=True, context=4)) == 18
    gradients = 18 * (2 * 2 * 64 + 2 * 4 * 16)  # of both: repeated in 16 bits, and summed in fp32
    assert layer_backward(layer, LayerTraining(weights=True, context=4)).activations > gradients + shared - alone


def test_backward_of_trained_experts_ends_with_all_gradients():
    """Three fp32 gradients, which are written as they are made. The 16-bit copies of all stacks are given back."""
    layer = LayerSizes(1, 2, 4096, 14336, 4096, 1024, 8)
    back = layer_backward(layer, LayerTraining(weights=True))
    assert back.gradients == 3 * 4 * layer.stack
    assert back.copies == 2 * layer.attention


@pytest.mark.parametrize(
    ("tokens", "copy", "copies"),
    [
        (4096, 2, 0),  # given back when the input's gradient is there; attention's is larger, and has its own
        (16384, 2, 0),  # w1 x and w3 x of all pairs
        (16385, 2, 3),  # 2 · (N - 16384) is above 8 · D: in pieces, and each reads all copies
        (16385, 0, 0),
    ],
)
def test_experts_that_are_trained_and_computed_again_end_with_all_gradients(tokens, copy, copies):
    layer = LayerSizes(tokens, 2 * tokens, 4096, 14336, 4096, 1024, 8)
    back = layer_backward(layer, LayerTraining(weights=True, recompute=True, copy=copy))
    assert back.gradients == 3 * 4 * layer.stack
    assert back.copies == (copies * 2 * layer.stack or copy * layer.attention)
