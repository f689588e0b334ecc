"""Linear and grouped products with dense and quantised weights, with or without a bias and LoRA adapters.

A weight is a tensor, or `Packed` where it is quantised. `Weight` adds its bias and its LoRA adapter, or a stack of
several adapters, of which each row of the input names one (`AdapterRows`). `ops.dispatch` chooses the kernel of each
product.

Legend: I in features, O out features, r LoRA rank, E experts, N rows sorted by expert, T tokens, A adapters. A stack
has a leading E; a stack of several adapters has a leading A·E, whose entry adapter · E + e belongs to expert e.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.ops import dispatch
from accessory.ops.dense_products import grouped_dense, sort_by_expert
from accessory.ops.dispatch import Product, product
from accessory.ops.quantized import Packed
from accessory.ops.quantized_products import packed_grouped, packed_linear


class Lora(NamedTuple):
    """One LoRA adapter of a weight or of a stack: scale · B A."""

    a: Tensor  # (r, I) or (E, r, I)
    b: Tensor  # (O, r) or (E, O, r)
    scale: float = 1.0


class Weight(NamedTuple):
    """The weight of a linear layer, or a stack of them, with its LoRA adapter: y = W x + scale · B (A x) + bias."""

    weight: Tensor | Packed  # (O, I) or (E, O, I)
    bias: Tensor | None = None  # (O,) or (E, O)
    lora_a: Tensor | None = None  # (r, I) or (E, r, I); of several adapters (A·E, r, I)
    lora_b: Tensor | None = None  # (O, r) or (E, O, r); of several adapters (A·E, O, r)
    lora_scale: float = 1.0
    scale_A: Tensor | None = None  # the scales of several adapters, fp32; None: there is one, with `lora_scale`

    @property
    def plain(self) -> bool:
        return self.bias is None and self.lora_a is None

    def scaled(self, low: Tensor) -> Tensor:
        """`low` = A x (…, r) times the LoRA scale. Scaling here touches r numbers a token; after B it would be O."""
        return low if self.lora_scale == 1.0 else low * self.lora_scale

    def stacks(self) -> tuple[Tensor, Tensor, Tensor]:
        """A and B of several adapters, and their scales."""
        assert self.lora_a is not None
        assert self.lora_b is not None
        assert self.scale_A is not None
        return self.lora_a, self.lora_b, self.scale_A

    def with_adapters(self, adapters: Sequence[Lora | None]) -> Weight:
        """This weight beside several adapters. None: an adapter that leaves this weight as it is.

        They get the rank of the largest: the smaller ones are filled up with zeros. An adapter that this weight has is
        left out.
        """
        present = [lora for lora in adapters if lora is not None]
        if not present:
            return self._replace(lora_a=None, lora_b=None, scale_A=None)
        rank = max(lora.a.shape[-2] for lora in present)
        like = present[0]
        empty = Lora(like.a.new_zeros(like.a.shape), like.b.new_zeros(like.b.shape), 0.0)
        filled = [empty if lora is None else lora for lora in adapters]
        a = [F.pad(lora.a, (0, 0, 0, rank - lora.a.shape[-2])) for lora in filled]
        b = [F.pad(lora.b, (0, rank - lora.b.shape[-1])) for lora in filled]
        scale_A = torch.tensor([lora.scale for lora in filled], dtype=torch.float32, device=like.a.device)
        join = torch.stack if like.a.dim() == 2 else torch.cat
        return self._replace(lora_a=join(a), lora_b=join(b), scale_A=scale_A)

    def unbind(self) -> list[Weight]:
        """Split a stack into one weight per expert."""
        assert self.scale_A is None, "one expert's part of several adapters is not needed"
        E = self.weight.shape[0]

        def entries(stack: Tensor | None) -> Sequence[Tensor | None]:
            # Indexing would make the gradient of each entry a whole stack that is zero outside that entry.
            return [None] * E if stack is None else stack.unbind()

        weights: Sequence[Tensor | Packed]
        weights = self.weight.unbind() if isinstance(self.weight, Tensor) else [self.weight[e] for e in range(E)]
        adapters = zip(entries(self.bias), entries(self.lora_a), entries(self.lora_b), strict=True)
        return [Weight(w, *adapter, lora_scale=self.lora_scale) for w, adapter in zip(weights, adapters, strict=True)]


class AdapterRows:
    """Which entry of a stack of adapters each row of a product takes; -1: none.

    A step makes one of its tokens' adapters, `AdapterRows(adapter_T, A)`, for all its linears and experts.
    """

    def __init__(self, number_N: Tensor, entries: int) -> None:
        """number_N: int64. entries: how many entries the stack has, A or A·E."""
        self.number_N, self.entries = number_N, entries

    @cached_property
    def sorted(self) -> tuple[Tensor, Tensor]:
        """(order_N, the rows of each entry). Rows that take none come last."""
        return sort_by_expert(self.number_N, self.entries)

    def of_pairs(self, token_N: Tensor, local_N: Tensor, experts: int) -> AdapterRows:
        """The entries of (token, expert) pairs, where this object's rows are tokens.

        local_N: each pair's expert among the `experts` that the stack has; a pair with another one takes none.
        """
        adapter_N = self.number_N[token_N]
        held_N = (adapter_N >= 0) & (local_N >= 0) & (local_N < experts)
        return AdapterRows(torch.where(held_N, adapter_N * experts + local_N, -1), self.entries * experts)


def linear(
    x: Tensor, weight: Tensor | Packed | Weight, bias_O: Tensor | None = None, adapters: AdapterRows | None = None
) -> Tensor:
    """x (…, I) times a weight: (…, O) in x's dtype. Dense weights are cast to it, because trained weights are fp32.

    adapters: the adapter of each of x's rows, where the weight has several.
    """
    if isinstance(weight, Weight):
        y = linear(x, weight.weight, weight.bias)
        if weight.lora_a is None or weight.lora_b is None:
            return y
        if weight.scale_A is not None:
            x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
            return add_adapters(y_TO, x_TI, weight, adapters).view(y.shape)
        return y + linear(weight.scaled(linear(x, weight.lora_a)), weight.lora_b)
    bias_O = None if bias_O is None else bias_O.to(x.dtype)
    if isinstance(weight, Packed):
        y = packed_linear(x, weight)
        return y if bias_O is None else y + bias_O
    return F.linear(x, weight.to(x.dtype), bias_O)


def grouped_linear(
    x_NI: Tensor, weight_EOI: Tensor | Packed | Weight, count_E: Tensor, adapters: AdapterRows | None = None
) -> Tensor:
    """Rows of x, sorted by expert, times their expert's weight, plus its LoRA adapter and bias: (N, O) in x's dtype.

    adapters: the entry of each row, where the weight has several adapters.
    """
    if isinstance(weight_EOI, Weight):
        w = weight_EOI
        y_NO = grouped_linear(x_NI, w.weight, count_E)
        if w.scale_A is not None:
            y_NO = add_adapters(y_NO, x_NI, w, adapters)
        elif w.lora_a is not None and w.lora_b is not None:
            low_NR = w.scaled(grouped_linear(x_NI, w.lora_a, count_E))
            y_NO = y_NO + grouped_linear(low_NR, w.lora_b, count_E)
        if w.bias is not None:
            N, bias_EO = x_NI.shape[0], w.bias.to(x_NI.dtype)
            # Rows of other ranks' experts get the last expert's bias. The host does not learn how many there are.
            filled_E = torch.cat([count_E[:-1], N - count_E[:-1].sum(dim=0, keepdim=True)])
            y_NO = y_NO + bias_EO.repeat_interleave(filled_E, dim=0, output_size=N)
        return y_NO
    if isinstance(weight_EOI, Packed):
        return packed_grouped(x_NI, weight_EOI, count_E)
    return grouped_dense(x_NI, weight_EOI, count_E)


def grouped_products(x_NI: Tensor, weight_EOI: Tensor | Packed | Weight, rows: int) -> list[Product]:
    """The products for which `grouped_linear` would ask `ops.dispatch`, with `rows` rows like those of x."""
    w = weight_EOI if isinstance(weight_EOI, Weight) else Weight(weight_EOI)
    if w.scale_A is not None and w.lora_b is not None:
        return [product("grouped", x_NI, w.weight, rows), product("adapters", x_NI, w.lora_b, rows)]
    return [product("grouped", x_NI, stack, rows) for stack in (w.weight, w.lora_a, w.lora_b) if stack is not None]


def add_adapters(y_NO: Tensor, x_NI: Tensor, weight: Weight, adapters: AdapterRows | None) -> Tensor:
    """y + scale · B (A x) of the adapter that each row takes. May change y. `weight` has several adapters."""
    assert adapters is not None, "a weight with several adapters needs each row's"
    kernel = dispatch.choose(product("adapters", x_NI, weight.lora_b, len(x_NI)))
    return kernel.load()(y_NO, x_NI, *weight.stacks(), adapters)


def adapters_in_turn(
    y_NO: Tensor, x_NI: Tensor, a_SRI: Tensor, b_SOR: Tensor, scale_A: Tensor, adapters: AdapterRows
) -> Tensor:
    """`add_adapters`, one entry of the stack after the other. CPUs use it, and tests compare with it."""
    experts = len(a_SRI) // len(scale_A)
    for number in adapters.number_N.unique().tolist():
        if number >= 0:
            (row_n,) = (adapters.number_N == number).nonzero(as_tuple=True)
            low_nR = linear(x_NI[row_n], a_SRI[number]) * scale_A[number // experts].to(x_NI.dtype)
            y_NO = y_NO.index_add(0, row_n, linear(low_nR, b_SOR[number]))
    return y_NO
