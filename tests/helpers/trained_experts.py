"""Small experts in training, and autograd through their products one by one to compare with."""

import torch

from accessory.ops.experts import grouped_experts
from accessory.ops.linear import Weight
from accessory.ops.quantized import Packed, dequantize, quantize

T, D, F, E, K = 13, 128, 256, 4, 2


def case(experts=E, lora=False, bias=False, format=None, seed=0, tokens=T):
    """(x, stacks, weight, expert): what gradients flow to is a leaf."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape, scale=0.3):
        return (torch.randn(*shape, generator=g) * scale).requires_grad_()

    stacks = []
    for O, I in ((F, D), (D, F), (F, D)):  # noqa: E741
        dense = leaf(experts, O, I)
        stacks.append(
            Weight(
                dense if format is None else quantize(dense.detach(), format),
                leaf(experts, O) if bias else None,
                leaf(experts, 8, I) if lora else None,
                leaf(experts, O, 8) if lora else None,
                lora_scale=0.5,
            )
        )
    expert_TK = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(tokens)])
    return leaf(tokens, D, scale=1.0), stacks, torch.rand(tokens, K, generator=g).requires_grad_(), expert_TK


def leaves(x, stacks, weight):
    fields = [t for w in stacks for t in (w.weight, w.bias, w.lora_a, w.lora_b) if isinstance(t, torch.Tensor)]
    return [x, weight, *fields]


def gradients(function, x, stacks, weight, expert, **options):
    y = function(x, *stacks, weight, expert, **options)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    return y, torch.autograd.grad((y * pull).sum(), leaves(x, stacks, weight))


def single_products(x, *stacks_and_routing):
    """`grouped_experts` with dense stacks, through which autograd finds its way."""
    *stacks, weight, expert = stacks_and_routing
    dense = [w._replace(weight=dequantize(w.weight)) if isinstance(w.weight, Packed) else w for w in stacks]
    return grouped_experts(x, *dense, weight, expert)


def agree(ours, theirs, bound=2e-6):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= bound * b.norm().clamp_min(1e-6)


WAYS = {
    "dense": {},
    "lora": {"lora": True},
    "biases": {"bias": True},
    "all": {"lora": True, "bias": True},
    "nf4": {"format": "nf4", "lora": True},
    "int4": {"format": "int4", "lora": True},
    "int8": {"format": "int8", "lora": True, "bias": True},
}
