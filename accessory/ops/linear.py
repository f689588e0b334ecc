"""Linear and grouped products with dense and quantised weights, with or without a bias and a LoRA adapter.

A weight is a tensor, or `Packed` where it is quantised. `Weight` adds its bias and its LoRA adapter. `ops.dispatch`
chooses the kernel of each product.

Legend: I in features, O out features, r LoRA rank, E experts, N rows sorted by expert. A stack has a leading E.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from accessory.ops.dense_products import grouped_dense
from accessory.ops.dispatch import Product, product
from accessory.ops.quantized import Packed
from accessory.ops.quantized_products import packed_grouped, packed_linear


class Weight(NamedTuple):
    """The weight of a linear layer, or a stack of them, with its LoRA adapter: y = W x + scale · B (A x) + bias."""

    weight: Tensor | Packed  # (O, I) or (E, O, I)
    bias: Tensor | None = None  # (O,) or (E, O)
    lora_a: Tensor | None = None  # (r, I) or (E, r, I)
    lora_b: Tensor | None = None  # (O, r) or (E, O, r)
    lora_scale: float = 1.0

    @property
    def plain(self) -> bool:
        return self.bias is None and self.lora_a is None

    def scaled(self, low: Tensor) -> Tensor:
        """`low` = A x (…, r) times the LoRA scale. Scaling here touches r numbers a token; after B it would be O."""
        return low if self.lora_scale == 1.0 else low * self.lora_scale

    def unbind(self) -> list[Weight]:
        """Split a stack into one weight per expert."""
        E = self.weight.shape[0]

        def entries(stack: Tensor | None) -> Sequence[Tensor | None]:
            # Indexing would make the gradient of each entry a whole stack that is zero outside that entry.
            return [None] * E if stack is None else stack.unbind()

        weights: Sequence[Tensor | Packed]
        weights = self.weight.unbind() if isinstance(self.weight, Tensor) else [self.weight[e] for e in range(E)]
        adapters = zip(entries(self.bias), entries(self.lora_a), entries(self.lora_b), strict=True)
        return [Weight(w, *adapter, lora_scale=self.lora_scale) for w, adapter in zip(weights, adapters, strict=True)]


def linear(x: Tensor, weight: Tensor | Packed | Weight, bias_O: Tensor | None = None) -> Tensor:
    """x (…, I) times a weight: (…, O) in x's dtype. Dense weights are cast to it, because trained weights are fp32."""
    if isinstance(weight, Weight):
        y = linear(x, weight.weight, weight.bias)
        if weight.lora_a is None or weight.lora_b is None:
            return y
        return y + linear(weight.scaled(linear(x, weight.lora_a)), weight.lora_b)
    bias_O = None if bias_O is None else bias_O.to(x.dtype)
    if isinstance(weight, Packed):
        y = packed_linear(x, weight)
        return y if bias_O is None else y + bias_O
    return F.linear(x, weight.to(x.dtype), bias_O)


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor | Packed | Weight, count_E: Tensor) -> Tensor:
    """Rows of x, sorted by expert, times their expert's weight, plus its LoRA adapter and bias: (N, O) in x's dtype."""
    if isinstance(weight_EOI, Weight):
        w = weight_EOI
        y_NO = grouped_linear(x_NI, w.weight, count_E)
        if w.lora_a is not None and w.lora_b is not None:
            low_NR = w.scaled(grouped_linear(x_NI, w.lora_a, count_E))
            y_NO = y_NO + grouped_linear(low_NR, w.lora_b, count_E)
        if w.bias is not None:
            bias_EO = w.bias.to(x_NI.dtype)
            y_NO = y_NO + bias_EO.repeat_interleave(count_E, dim=0, output_size=x_NI.shape[0])
        return y_NO
    if isinstance(weight_EOI, Packed):
        return packed_grouped(x_NI, weight_EOI, count_E)
    return grouped_dense(x_NI, weight_EOI, count_E)


def grouped_products(x_NI: Tensor, weight_EOI: Tensor | Packed | Weight, rows: int) -> list[Product]:
    """The products for which `grouped_linear` would ask `ops.dispatch`, with `rows` rows like those of x."""
    w = weight_EOI if isinstance(weight_EOI, Weight) else Weight(weight_EOI)
    return [product("grouped", x_NI, stack, rows) for stack in (w.weight, w.lora_a, w.lora_b) if stack is not None]
