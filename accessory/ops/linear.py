"""The one place where a weight meets its input: what the weight is decides the product.

Legend: I in features, O out features, r LoRA's rank, E experts. A stack of weights has a leading E.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from accessory.ops.fp8 import fp8_linear, has_fp8
from accessory.ops.quantized import TILED_ROWS_GPU, Packed, packed_linear


class Weight(NamedTuple):
    """The weight of a linear, or a stack, and what finetuning has put beside it: y = W x + scale · B (A x) + bias."""

    weight: Tensor | Packed  # (O, I) or (E, O, I)
    bias: Tensor | None = None  # (O,) or (E, O)
    lora_a: Tensor | None = None  # (r, I) or (E, r, I)
    lora_b: Tensor | None = None  # (O, r) or (E, O, r)
    lora_scale: float = 1.0

    @property
    def plain(self) -> bool:
        return self.bias is None and self.lora_a is None

    def scaled(self, low: Tensor) -> Tensor:
        """A x (…, r) times LoRA's scale: here, where there are r numbers a token and not O."""
        return low if self.lora_scale == 1.0 else low * self.lora_scale

    def unbind(self) -> list[Weight]:
        """The weights of a stack, one an expert."""
        E = self.weight.shape[0]

        def entries(stack: Tensor | None) -> Sequence[Tensor | None]:
            # Not one by one: the gradient of each entry would then be a whole stack, zero but for that entry.
            return [None] * E if stack is None else stack.unbind()

        weights: Sequence[Tensor | Packed]
        weights = self.weight.unbind() if isinstance(self.weight, Tensor) else [self.weight[e] for e in range(E)]
        beside = zip(entries(self.bias), entries(self.lora_a), entries(self.lora_b), strict=True)
        return [Weight(w, *b, lora_scale=self.lora_scale) for w, b in zip(weights, beside, strict=True)]


def linear(x: Tensor, weight: Tensor | Packed | Weight, bias_O: Tensor | None = None) -> Tensor:
    """x (…, I) times a weight, in x's dtype: trained weights are kept in fp32, whatever the network computes in."""
    if isinstance(weight, Weight):
        y = linear(x, weight.weight, weight.bias)
        if weight.lora_a is None or weight.lora_b is None:
            return y
        return y + linear(weight.scaled(linear(x, weight.lora_a)), weight.lora_b)
    bias_O = None if bias_O is None else bias_O.to(x.dtype)
    if isinstance(weight, Packed):
        tiled = x.numel() <= TILED_ROWS_GPU * x.shape[-1]
        if not tiled and has_fp8(x, weight):
            y = fp8_linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
        else:
            y = packed_linear(x, weight)
        return y if bias_O is None else y + bias_O
    return F.linear(x, weight.to(x.dtype), bias_O)
