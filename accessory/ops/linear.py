"""Linear and grouped products with dense and quantised weights, with or without a bias and LoRA adapters.

A weight is a tensor, or `Packed` where it is quantised. `Weight` adds its bias and its LoRA adapter, or several
adapters, of which each row of the input names one (`AdapterRows`). `ops.dispatch` chooses the kernel of each
product.

Legend: I in features, O out features, r LoRA rank, E experts, N rows sorted by expert, T tokens, A adapters. A stack
has a leading E; a stack of several adapters has a leading A·E, whose entry adapter · E + e belongs to expert e.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.ops import dispatch
from accessory.ops.compute_copy import in_dtype
from accessory.ops.dense_products import dense_linear, grouped_dense, sort_by_expert
from accessory.ops.dispatch import Product, product
from accessory.ops.quantized import Packed
from accessory.ops.quantized_products import packed_grouped, packed_linear


class LinearAdapter(NamedTuple):
    """What one adapter adds to the product of a weight, or of a stack: scale · B (A x) + bias."""

    a: Tensor | None = None  # (r, I) or (E, r, I)
    b: Tensor | None = None  # (O, r) or (E, O, r)
    scale: float = 1.0
    bias: Tensor | None = None  # (O,) or (E, O), beside the weight's own bias


class Weight(NamedTuple):
    """The weight of a linear layer, or a stack of them, with its LoRA adapter: y = W x + scale · B (A x) + bias."""

    weight: Tensor | Packed  # (O, I) or (E, O, I)
    bias: Tensor | None = None  # (O,) or (E, O)
    lora_a: Tensor | None = None  # (r, I) or (E, r, I); of several adapters (A·E, r, I)
    lora_b: Tensor | None = None  # (O, r) or (E, O, r); of several adapters (A·E, O, r)
    lora_scale: float = 1.0
    scale_A: Tensor | None = None  # the scales of several adapters, fp32; None: there is one, with `lora_scale`
    bias_SO: Tensor | None = None  # the biases of several adapters, behind a row of zeros: (1 + A, O) or (1 + A·E, O)

    @property
    def plain(self) -> bool:
        return self.bias is None and self.lora_a is None and self.bias_SO is None

    @property
    def several(self) -> bool:
        """Whether several adapters stand beside the weight, of which each row takes one."""
        return self.scale_A is not None or self.bias_SO is not None

    def scaled(self, low: Tensor) -> Tensor:
        """`low` = A x (…, r) times the LoRA scale. Scaling here touches r numbers a token; after B it would be O."""
        return low if self.lora_scale == 1.0 else low * self.lora_scale

    def with_adapters(self, adapters: Sequence[LinearAdapter | None]) -> Weight:
        """This weight beside several adapters. None: an adapter that leaves this weight as it is.

        They get the rank of the largest: the smaller ones are filled up with zeros. A LoRA adapter that this weight has
        is left out.
        """
        alone = self._replace(lora_a=None, lora_b=None, scale_A=None, bias_SO=None)
        return alone._replace(**_low_rank_stacks(adapters), bias_SO=_bias_stack(adapters))

    def without_adapters(self) -> Weight:
        """This weight as rows have it that take none of its several adapters."""
        return self._replace(lora_a=None, lora_b=None, scale_A=None, bias_SO=None) if self.several else self

    def unbind(self) -> list[Weight]:
        """Split a stack into one weight per expert."""
        assert not self.several, "one expert's part of several adapters is not needed"
        E = self.weight.shape[0]

        def entries(stack: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * E if stack is None else stack.unbind()

        weights: Sequence[Tensor | Packed]
        weights = self.weight.unbind() if isinstance(self.weight, Tensor) else [self.weight[e] for e in range(E)]
        adapters = zip(entries(self.bias), entries(self.lora_a), entries(self.lora_b), strict=True)
        return [Weight(w, *adapter, lora_scale=self.lora_scale) for w, adapter in zip(weights, adapters, strict=True)]


def _low_rank_stacks(adapters: Sequence[LinearAdapter | None]) -> dict[str, Any]:
    """The fields of `Weight` for the LoRA parts of several adapters; empty where none has one."""
    parts = [None if adapter is None or adapter.a is None or adapter.b is None else adapter for adapter in adapters]
    present = [(part.a, part.b) for part in parts if part is not None and part.a is not None and part.b is not None]
    if not present:
        return {}
    rank, (like_a, like_b) = max(a.shape[-2] for a, _ in present), present[0]
    pairs = [(None, None) if part is None else (part.a, part.b) for part in parts]
    a = [like_a.new_zeros(like_a.shape) if a is None else a for a, _ in pairs]
    b = [like_b.new_zeros(like_b.shape) if b is None else b for _, b in pairs]
    join = torch.stack if like_a.dim() == 2 else torch.cat
    scales = [0.0 if part is None else part.scale for part in parts]
    return {
        "lora_a": join([F.pad(t, (0, 0, 0, rank - t.shape[-2])) for t in a]),
        "lora_b": join([F.pad(t, (0, rank - t.shape[-1])) for t in b]),
        "scale_A": torch.tensor(scales, dtype=torch.float32, device=like_a.device),
    }


def _bias_stack(adapters: Sequence[LinearAdapter | None]) -> Tensor | None:
    """`Weight.bias_SO` of several adapters; None where none has a bias."""
    biases = [None if adapter is None else adapter.bias for adapter in adapters]
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    rows = [like.new_zeros(like.shape) if bias is None else bias for bias in biases]
    return torch.cat([like.new_zeros(1, like.shape[-1]), *(row.reshape(-1, like.shape[-1]) for row in rows)])


class AdapterRows:
    """Which entry of a stack of adapters each row of a product takes; -1: none.

    A step makes one of its tokens' adapters, `AdapterRows(adapter_T, A)`, for all its linears and experts.
    """

    def __init__(self, number_N: Tensor, entries: int) -> None:
        """number_N: int64. entries: how many entries the stack has, A or A·E."""
        self.number_N, self.entries = number_N, entries

    def __getitem__(self, row_n: Tensor) -> AdapterRows:
        """The adapters of some rows."""
        return AdapterRows(self.number_N[row_n], self.entries)

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

    adapters: the adapter of each of x's rows, where the weight has several; None: no row takes one.
    """
    if isinstance(weight, Weight):
        y = linear(x, weight.weight, weight.bias)
        if weight.several:
            if adapters is None:
                return y
            x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
            return add_adapters(y_TO, x_TI, weight, adapters).view(y.shape)
        if weight.lora_a is None or weight.lora_b is None:
            return y
        low = weight.scaled(linear(x, weight.lora_a))
        if not x.is_cuda or dispatch.fixed():
            return y + linear(low, weight.lora_b)
        # Added by the product itself, which spares a pass over y.
        b_Or = in_dtype(weight.lora_b, x.dtype)
        return torch.addmm(y.reshape(-1, y.shape[-1]), low.reshape(-1, low.shape[-1]), b_Or.t()).view(y.shape)
    bias_O = None if bias_O is None else in_dtype(bias_O, x.dtype)
    if isinstance(weight, Packed):
        y = packed_linear(x, weight)
        return y if bias_O is None else y + bias_O
    return dense_linear(x, in_dtype(weight, x.dtype), bias_O)


def grouped_linear(
    x_NI: Tensor, weight_EOI: Tensor | Packed | Weight, count_E: Tensor, adapters: AdapterRows | None = None
) -> Tensor:
    """Rows of x, sorted by expert, times their expert's weight, plus its LoRA adapter and bias: (N, O) in x's dtype.

    adapters: the entry of each row, where the weight has several adapters; None: no row takes one.
    """
    if isinstance(weight_EOI, Weight):
        w = weight_EOI
        y_NO = grouped_linear(x_NI, w.weight, count_E)
        if w.several:
            y_NO = y_NO if adapters is None else add_adapters(y_NO, x_NI, w, adapters)
        elif w.lora_a is not None and w.lora_b is not None:
            low_NR = w.scaled(grouped_linear(x_NI, w.lora_a, count_E))
            y_NO = y_NO + grouped_linear(low_NR, w.lora_b, count_E)
        if w.bias is not None:
            N, bias_EO = x_NI.shape[0], in_dtype(w.bias, x_NI.dtype)
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
    if w.several:
        low_rank = [] if w.lora_b is None else [product("adapters", x_NI, w.lora_b, rows)]
        return [product("grouped", x_NI, w.weight, rows), *low_rank]
    return [product("grouped", x_NI, stack, rows) for stack in (w.weight, w.lora_a, w.lora_b) if stack is not None]


def add_adapters(y_NO: Tensor, x_NI: Tensor, weight: Weight, adapters: AdapterRows) -> Tensor:
    """y + scale · B (A x) + bias of the adapter that each row takes. May change y. `weight` has several adapters."""
    if weight.scale_A is not None:
        kernel = dispatch.choose(product("adapters", x_NI, weight.lora_b, len(x_NI)))
        y_NO = kernel.load()(y_NO, x_NI, weight.lora_a, weight.lora_b, weight.scale_A, adapters)
    if weight.bias_SO is not None:
        y_NO = y_NO + weight.bias_SO.to(y_NO.dtype)[adapters.number_N + 1]
    return y_NO


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
