"""The planner's memory for a layer's passes, against autograd and numbers worked out by hand."""

import pytest
import torch

from accessory.nn.experts_base import BaseExperts
from accessory.nn.experts_sparse import SparseExperts
from accessory.ops.routing import route
from accessory.planner.activations import LayerSizes, LayerTraining, experts_kept, layer_backward, layer_kept


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", [SparseExperts, BaseExperts])
def test_what_autograd_keeps_of_experts(kind, lora):
    """Counts the float tensors saved for backward, except weights, routing, and LoRA's narrow tensors."""
    D, F, E, K, T, rank = 64, 96, 4, 2, 128, 5
    experts = kind(D, F, E)
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
    held, kept = [], {}

    def keep(tensor):
        held.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point() and not {1, rank} & set(tensor.shape):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(x_TD, weight_TK, expert_TK)
    layer = LayerSizes(T, T * K, D, F, D, D, E, expert_by_expert=kind is BaseExperts)
    copies = 0 if lora else 2 * 3 * layer.stack
    training = LayerTraining(weights=not lora, experts_lora=lora)
    assert sum(kept.values()) == experts_kept(layer, training) + copies


def test_a_layer_of_mixtral_by_hand():
    """One token's bytes, two experts a token, all trained."""
    D, F = 4096, 14336
    layer = LayerSizes(1, 2, D, F, D, 1024, 8, expert_by_expert=False)
    training = LayerTraining(weights=True, gate=True, packing=False)
    stream = 2 * 4 * D + 2 * D  # the input and the sum after attention; attention's input
    attention = 2 * (D + 1024) + 2 * 1024 + 2 * D  # queries and keys, values, the output
    experts = 4 * D + 2 * 2 * D + 4 * 2 * 2 * F + 2 * 4 * D  # the router's input, sorted rows, SwiGLU, fp32 outputs
    assert layer_kept(layer, training) == stream + attention + experts == 356352


def test_backward_of_trained_experts_ends_with_all_gradients_and_one_being_made():
    """Backward ends with three fp32 gradients, w1's gradient in 16 bits as well, and w1's 16-bit copy."""
    layer = LayerSizes(1, 2, 4096, 14336, 4096, 1024, 8, expert_by_expert=False)
    back = layer_backward(layer, LayerTraining(weights=True))
    assert back.gradients == (4 + 4 + 4 + 2) * layer.stack
    assert back.copies == 2 * (layer.stack + layer.attention)
