"""Experts with adapters for tests of kernels: random ones, and their feed-forward by definition, in fp64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accessory.ops.linear import LinearAdapter, Weight
from accessory.ops.quantized import Packed, dequantize


class Kind(NamedTuple):
    """One of w1, w2 and w3: a stack, its biases, and its adapters. None: an adapter without a part here."""

    weight: Tensor | Packed
    bias: Tensor | None
    adapters: list[LinearAdapter | None]

    def of_expert(self, e: int, adapter: int) -> tuple[Tensor, Tensor | float]:
        """(weight with the adapter merged in, bias), fp64."""
        weight = self.weight[e] if isinstance(self.weight, Tensor) else dequantize(self.weight[e])
        weight, lora = weight.double(), self.adapters[adapter] if adapter >= 0 else None
        if lora is not None:
            weight = weight + lora.scale * lora.b[e].double() @ lora.a[e].double()
        return weight, 0.0 if self.bias is None else self.bias[e].double()

    def part(self, first: int, held: int, device: str, several: bool) -> Weight:
        """The experts `first … first + held - 1` as kernels take them, with all adapters or with the first one."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[first : first + held].contiguous().to(device)

        weight = cut(self.weight) if isinstance(self.weight, Tensor) else self.weight.map(cut)
        whole = Weight(weight, None if self.bias is None else cut(self.bias))
        loras = [
            None if lora is None else LinearAdapter(cut(lora.a), cut(lora.b), lora.scale) for lora in self.adapters
        ]
        if several:
            return whole.with_adapters(loras)
        if not loras or loras[0] is None:
            return whole
        return whole._replace(lora_a=loras[0].a, lora_b=loras[0].b, lora_scale=loras[0].scale)


def random_kind(
    weight: Tensor | Packed, ranks: tuple[int, ...], bias: bool, generator: torch.Generator, dtype: torch.dtype
) -> Kind:
    """ranks: one for each adapter; 0: none here."""
    E, O, I = weight.shape  # noqa: E741

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.2).to(dtype)

    adapters = [LinearAdapter(draw(E, r, I), draw(E, O, r), 0.5 + n) if r else None for n, r in enumerate(ranks)]
    return Kind(weight, draw(E, O) if bias else None, adapters)


def feed_forward(
    x_TD: Tensor, kinds: tuple[Kind, Kind, Kind], weight_TK: Tensor, expert_TK: Tensor, adapter_T: Tensor, held: range
) -> Tensor:
    """Σ_k weight · w2 (silu(w1 x) ⊙ w3 x) of the held experts, token by token: (T, D) fp64. h is in x's dtype."""
    w1, w2, w3 = kinds
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    for t, (experts, adapter) in enumerate(zip(expert_TK.tolist(), adapter_T.tolist(), strict=True)):
        for k, e in enumerate(experts):
            if e not in held:
                continue
            (w_up, b_up), (w_gate, b_gate), (w_down, b_down) = (w.of_expert(e, adapter) for w in (w3, w1, w2))
            x_D = x_TD[t].double()
            gate = w_gate @ x_D + b_gate
            h_F = (gate * gate.sigmoid() * (w_up @ x_D + b_up)).to(x_TD.dtype).double()
            y_TD[t] += weight_TK[t, k].double() * (w_down @ h_F + b_down)
    return y_TD
