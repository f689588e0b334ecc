"""The experts' feed-forward in training: all experts as grouped products, forward and backward, as one operation.

Of the activations only the pre-activations w1 x and w3 x are kept, or, where the layer is computed again, nothing but
the input: SwiGLU is computed again in backward, and w2's product is not needed there at all. The gradient of a routing
weight is ⟨dy, w2 h⟩ = ⟨w2ᵀ dy, h⟩, where dy is the gradient of the weighted sum. So neither the experts' results nor
their gradients times the weights are kept.

What is not kept is made for some rows at a time. So of the tensors (N, F) at most two are ever there as a whole, w1 x
and w3 x, whose gradients take their places. Where the layer is computed again, they too are made for some rows at a
time, if that takes less memory: each piece then reads all three stacks, so copies of them stay.

A stack may be dense or quantised, trained or frozen, with a bias and a LoRA adapter. Adapters stay products of low
rank: their parts are added to the large products, and no update of a weight is ever built.

Legend: T tokens, K experts a token, N (token, expert) pairs sorted by expert, or a piece of them, E experts, D dim,
F hidden dim, r rank, O out, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accessory.limits import TRAINED_PAIRS_AT_ONCE
from accessory.ops import dispatch
from accessory.ops.compute_copy import copy_of, in_dtype
from accessory.ops.dense_products import Term, grouped_backward, grouped_dense, sort_by_expert
from accessory.ops.dense_products import sum_of_terms as sum_of_dense_terms
from accessory.ops.experts import combine, gate, gate_backward
from accessory.ops.linear import Weight
from accessory.ops.linear_autograd import SumOverRanks
from accessory.ops.quantized import Packed
from accessory.ops.quantized_products import (
    dequantized_for_products,
    multiplied_dequantized,
    packed_grouped,
    packed_grouped_backward,
)
from accessory.ops.stack_gradients import FIELDS, StackGradients

_OPS: Sequence[dispatch.Op] = ("grouped", "grouped_backward", "grouped_weights")
MANY = 2**20  # rows: kernels for few rows need the host less than those for many
STACKS = 3  # w1, w2, w3


class _Plan(NamedTuple):
    """What of a call is no tensor with a gradient."""

    packed: Sequence[Packed | None]  # w1, w2, w3 where they are quantised
    scales: Sequence[float]  # of their LoRA adapters
    first: int | None
    recompute: bool
    sum_over_ranks: SumOverRanks | None


def trained_experts(
    x_TD: Tensor,
    w1_EFD: Weight,
    w2_EDF: Weight,
    w3_EFD: Weight,
    weight_TK: Tensor,
    expert_TK: Tensor,
    first: int | None = None,
    recompute: bool = False,
    sum_over_ranks: SumOverRanks | None = None,
) -> Tensor:
    """`ops.experts.grouped_experts` with gradients, (T, D) fp32; `backward` works once.

    first: the weights are those of the experts `first … first + E - 1`, and the host waits to learn how many pairs they
    got, so that no memory is taken for the others. recompute: keep the input only. sum_over_ranks: for the input's
    gradient, of which each rank has a part; the gradients of weights are made meanwhile.
    """
    weights = (w1_EFD, w2_EDF, w3_EFD)
    fields: list[Tensor | None] = []
    for w in weights:
        fields += [w.weight if isinstance(w.weight, Tensor) else None, w.bias, w.lora_a, w.lora_b]
    packed = [w.weight if isinstance(w.weight, Packed) else None for w in weights]
    plan = _Plan(packed, [w.lora_scale for w in weights], first, recompute, sum_over_ranks)
    return _Experts.apply(x_TD, weight_TK, expert_TK, plan, *fields)


class _Stack(NamedTuple):
    """A stack of weights in the dtype of the products."""

    weight: Any  # Tensor or Packed
    bias_EO: Tensor | None
    a_ErI: Tensor | None
    b_EOr: Tensor | None
    scale: float
    cast: bool  # whether the weight is a copy that this pass has made


class _Inner(NamedTuple):
    """w1 x and w3 x, and the products of low rank on the way there."""

    gate_NF: Tensor
    up_NF: Tensor
    low1_Nr: Tensor | None
    low3_Nr: Tensor | None

    def of(self, rows: slice) -> _Inner:
        """Views of some rows."""
        return _Inner(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]


class _Piece(NamedTuple):
    """Rows that follow one another. The device knows how many of them each expert has, the host does not."""

    rows: slice
    count_E: Tensor


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, plan: _Plan, *fields: Any) -> Tensor:
        w1, w2, w3 = _stacks(plan, fields, x_TD.dtype)
        order_N, count_E = sort_by_expert(expert_TK, w1.weight.shape[0], plan.first or 0)
        if plan.first is not None:
            order_N = order_N[: int(count_E.sum())]
        token_N, rows = order_N // expert_TK.shape[1], len(order_N)
        pieces, inner = _pieces(count_E, rows), None
        if not plan.recompute or _whole_gate_and_up((w1, w2, w3), x_TD, rows):
            inner = _gate_and_up(x_TD[token_N], w1, w3, count_E, in_turn=len(pieces) > 1)
        ctx.plan, ctx.fields, ctx.inner = plan, fields, None if plan.recompute else inner
        ctx.kept = (None,) * STACKS if plan.recompute else (w1.weight, w2.weight, w3.weight)
        ctx.save_for_backward(x_TD, weight_TK, order_N, count_E)
        if len(pieces) > 1:
            w1, w2, w3 = _for_pieces((w1, w2, w3), x_TD, rows, inner is not None)
        y_ND = None
        for piece in pieces:
            if inner is not None:
                gate_NF, up_NF, *_ = inner.of(piece.rows)
            else:
                gate_NF, up_NF, *_ = _gate_and_up(x_TD[token_N[piece.rows]], w1, w3, piece.count_E)
            h_NF = gate(gate_NF, up_NF)
            del gate_NF, up_NF
            y_ND = _put(_product(h_NF, w2, piece.count_E)[0], y_ND, piece.rows, rows)
            del h_NF
        del inner, w1, w2, w3
        assert y_ND is not None
        return combine(y_ND, order_N, weight_TK, None if plan.first is None else count_E.sum())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.plan is None:
            raise RuntimeError("backward of the experts works once: it writes over what forward kept")
        x_TD, weight_TK, order_N, count_E = ctx.saved_tensors
        plan, kept, inner, fields = ctx.plan, ctx.kept, ctx.inner, ctx.fields
        ctx.plan = ctx.kept = ctx.inner = ctx.fields = None
        stacks = _stacks(plan, fields, x_TD.dtype, kept)
        found = StackGradients(fields, ctx.needs_input_grad[4:])
        rows = _Backward(x_TD, grads[0], weight_TK, order_N, stacks, inner, found, ctx.needs_input_grad[0], plan)
        del kept, stacks, inner
        rows.run(count_E)
        assert rows.dweight_N is not None
        dweight = rows.dweight_N.new_zeros(weight_TK.numel()).scatter_(0, order_N, rows.dweight_N)
        rows.wait()
        return rows.dx_TD, dweight.view_as(weight_TK).to(weight_TK.dtype), None, None, *found.gradients


class _Backward:
    """The rows on their way back. What a method gives back before it ends is held by `self` alone."""

    def __init__(
        self, x_TD: Tensor, dy_TD: Tensor, weight_TK: Tensor, order_N: Tensor, stacks: Sequence[_Stack],
        inner: _Inner | None, found: StackGradients, wants_dx: bool, plan: _Plan,
    ) -> None:  # fmt: skip
        self.x_TD, self.dy_TD, self.found, self.wants_dx, self.plan = x_TD, dy_TD, found, wants_dx, plan
        self.weight_TK, self.order_N = weight_TK, order_N
        self.token_N, self.weight_N = order_N // weight_TK.shape[1], weight_TK.flatten()[order_N]
        self.w1, self.w2, self.w3 = stacks
        self.inner = inner  # of all rows, or of a piece while it is computed
        self.dx_ND: Tensor | None = None
        self.dx_TD: Tensor | None = None
        self.wait: Callable[[], object] = lambda: None  # for the sum of dx over ranks
        self.dweight_N: Tensor | None = None

    def run(self, count_E: Tensor) -> None:
        rows = len(self.token_N)
        pieces = _pieces(count_E, rows)
        self.products = None if self.plan.first is None else count_E.sum()
        if len(pieces) > 1:
            stacks = (self.w1, self.w2, self.w3)
            if self.inner is None and _whole_gate_and_up(stacks, self.x_TD, rows):
                self.inner = _gate_and_up(self.x_TD[self.token_N], self.w1, self.w3, count_E, in_turn=True)
            self.w1, self.w2, self.w3 = _for_pieces(stacks, self.x_TD, rows, self.inner is not None)
            del stacks
        whole = self.inner is not None
        self.dy_TD = self.dy_TD.to(self.x_TD.dtype)
        for piece in pieces:
            last = piece is pieces[-1]
            self._through_w2(piece, last)
            if not whole:
                self._through_w1_and_w3(piece, last)
        if whole:
            self._through_w1_and_w3(_Piece(slice(0, rows), count_E), last=True)

    def _through_w2(self, piece: _Piece, last: bool) -> None:
        """From dy to the gradients of w1 x and w3 x, which take their places."""
        rows, count_E = piece
        dy_ND = self.dy_TD[self.token_N[rows]]
        if last:
            del self.dy_TD
        dlow2_Nr = _into_low(dy_ND, self.w2, count_E)
        dh_NF = _back([(dy_ND, self.w2, dlow2_Nr)], count_E)
        if last:
            self.w2 = self.w2._replace(weight=None)  # its copy is given back
        if self.inner is None:
            # The last one read here is the first one read below, so it stays dequantised.
            self.w3 = _dequantized(self.w3, self.x_TD, len(self.token_N))
            self.inner = inner = _gate_and_up(self.x_TD[self.token_N[rows]], self.w1, self.w3, count_E)
        else:
            inner = self.inner.of(rows)
        wanted = self.found.wants(1)
        dweight_N = gate_backward(inner.gate_NF, inner.up_NF, dh_NF, self.weight_N[rows], wanted)
        if self.w2.bias_EO is not None:
            dweight_N += (dy_ND.float() * _rows_of(self.w2.bias_EO, count_E, len(dy_ND)).float()).sum(-1)
        self.dweight_N = _put(dweight_N, self.dweight_N, rows, len(self.token_N))
        if wanted:  # dh holds each row's weight times h
            low2_Nr = None if self.w2.a_ErI is None else grouped_dense(dh_NF, self.w2.a_ErI, count_E) * self.w2.scale
            self.found.add(1, dy_ND, dh_NF, low2_Nr, dlow2_Nr, count_E, self.weight_N[rows])

    def _through_w1_and_w3(self, piece: _Piece, last: bool) -> None:
        """The input's gradient comes first, and ranks sum it while those of weights are made. The gradient of w3 x is
        given back before that of w1 is made."""
        rows, count_E = piece
        assert self.inner is not None
        dgate_NF, dup_NF, low1_Nr, low3_Nr = self.inner
        self.inner = None
        dlow1_Nr, dlow3_Nr = _into_low(dgate_NF, self.w1, count_E), _into_low(dup_NF, self.w3, count_E)
        if self.wants_dx:
            dx_ND = _back([(dup_NF, self.w3, dlow3_Nr), (dgate_NF, self.w1, dlow1_Nr)], count_E)
            self.dx_ND = _put(dx_ND, self.dx_ND, rows, len(self.token_N))
            del dx_ND
        if last:
            self._begin_dx()
            self.w1, self.w3 = self.w1._replace(weight=None), self.w3._replace(weight=None)
        if self.found.wants(0) or self.found.wants(2):
            x_ND = self.x_TD[self.token_N[rows]]
            self.found.add(2, dup_NF, x_ND, low3_Nr, dlow3_Nr, count_E)
            del dup_NF, low3_Nr, dlow3_Nr
            self.found.add(0, dgate_NF, x_ND, low1_Nr, dlow1_Nr, count_E)

    def _begin_dx(self) -> None:
        """All rows have their input's gradient: sum those of a token, and begin the sum over ranks."""
        if self.dx_ND is None:
            return
        dx_TD = combine(self.dx_ND, self.order_N, torch.ones_like(self.weight_TK), self.products)
        self.dx_ND = None
        self.dx_TD = dx_TD.to(self.x_TD.dtype)
        if self.plan.sum_over_ranks is not None:
            self.wait = self.plan.sum_over_ranks(self.dx_TD)


def runs_host_free(dtype: torch.dtype, device: torch.device, weights: Sequence[Weight]) -> bool:
    """Whether both passes run without the host learning the routing. A CUDA graph needs that."""
    return all(
        dispatch.choose(dispatch.product(op, torch.empty(0, device=device, dtype=dtype), stack, MANY)).host_free
        for w in weights
        for stack in (w.weight, w.lora_a, w.lora_b)
        if stack is not None
        for op in (_OPS if isinstance(stack, Tensor) else _OPS[:2])
    )


# --------------------------------------------------------------------------- pieces of rows


def _pieces(count_E: Tensor, rows: int) -> list[_Piece]:
    """All rows, in order. The host does not wait for the counts."""
    if rows <= TRAINED_PAIRS_AT_ONCE:
        return [_Piece(slice(0, rows), count_E)]
    end_E = count_E.cumsum(0)
    bounds = [(start, min(start + TRAINED_PAIRS_AT_ONCE, rows)) for start in range(0, rows, TRAINED_PAIRS_AT_ONCE)]
    return [_Piece(slice(*b), end_E.clamp(*b) - (end_E - count_E).clamp(*b)) for b in bounds]


def _put(part: Tensor, whole: Tensor | None, at: slice, rows: int) -> Tensor:
    """The tensor of so many rows with this part of it. All rows at once are that tensor, and nothing is copied."""
    if len(part) == rows:
        return part
    if whole is None:
        whole = part.new_empty(rows, *part.shape[1:])
    whole[at] = part
    return whole


# --------------------------------------------------------------------------- stacks and their products


def _stacks(
    plan: _Plan, fields: Sequence[Tensor | None], dtype: torch.dtype, kept: Sequence[Any] = (None,) * STACKS
) -> list[_Stack]:
    """w1, w2 and w3 in the dtype of the products. kept: copies that forward made."""

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else in_dtype(tensor, dtype)

    stacks = []
    for n in range(STACKS):
        dense, bias, a, b = fields[n * FIELDS : (n + 1) * FIELDS]
        weight = kept[n] if kept[n] is not None else plan.packed[n] if dense is None else cast(dense)
        made = dense is not None and dense.dtype != dtype and copy_of(dense) is None
        stacks.append(_Stack(weight, cast(bias), cast(a), cast(b), plan.scales[n], made))
    return stacks


def _product(x_NI: Tensor, stack: _Stack, count_E: Tensor) -> tuple[Tensor, Tensor | None]:
    """(rows times their expert's weight with all that stands beside it, rows times A and the adapter's scale)."""
    low_Nr = None if stack.a_ErI is None else grouped_dense(x_NI, stack.a_ErI, count_E) * stack.scale
    if isinstance(stack.weight, Packed):
        y_NO = packed_grouped(x_NI, stack.weight, count_E, grad=True)
        if low_Nr is not None:
            y_NO += grouped_dense(low_Nr, stack.b_EOr, count_E)  # type: ignore[arg-type]
    else:
        y_NO = sum_of_dense_terms([Term(x_NI, stack.weight, low_Nr, stack.b_EOr)], count_E, back=False)
    if stack.bias_EO is not None:
        y_NO += _rows_of(stack.bias_EO, count_E, len(x_NI))
    return y_NO, low_Nr


def _gate_and_up(x_ND: Tensor, w1: _Stack, w3: _Stack, count_E: Tensor, in_turn: bool = False) -> _Inner:
    """in_turn: dequantise each stack here where its product would, so that an adapter's part may be added to tiles."""
    rows = len(x_ND)
    gate_NF, low1_Nr = _product(x_ND, _dequantized(w1, x_ND, rows) if in_turn else w1, count_E)
    up_NF, low3_Nr = _product(x_ND, _dequantized(w3, x_ND, rows) if in_turn else w3, count_E)
    return _Inner(gate_NF, up_NF, low1_Nr, low3_Nr)


def _whole_gate_and_up(stacks: Sequence[_Stack], x_TD: Tensor, rows: int) -> bool:
    """Whether w1 x and w3 x are made of all rows, although they are not kept and the rest is made in pieces.

    In pieces the two take less, but copies of stacks stay from piece to piece: two more that are dequantised, or w2's
    that was cast. All are as wide as F.
    """
    more = rows - TRAINED_PAIRS_AT_ONCE
    dequantizes = any(isinstance(w.weight, Packed) and multiplied_dequantized(w.weight, x_TD, rows) for w in stacks)
    copies = 2 if dequantizes else any(w.cast for w in stacks)
    return 0 < 2 * more <= copies * stacks[0].weight.shape[0] * x_TD.shape[1]


def _for_pieces(stacks: Sequence[_Stack], x_TD: Tensor, rows: int, w2_alone: bool) -> list[_Stack]:
    """The stacks that each piece reads are dequantised once."""
    return [w if w2_alone and n != 1 else _dequantized(w, x_TD, rows) for n, w in enumerate(stacks)]


def _dequantized(stack: _Stack, x: Tensor, rows: int) -> _Stack:
    """The stack, dequantised in x's dtype where each product of so many rows would do that first."""
    if not isinstance(stack.weight, Packed):
        return stack
    return stack._replace(weight=dequantized_for_products(stack.weight, x, rows))


def _into_low(dy_NO: Tensor, stack: _Stack, count_E: Tensor) -> Tensor | None:
    """The gradient of A x, (N, r); None without an adapter."""
    return None if stack.b_EOr is None else grouped_backward(dy_NO, stack.b_EOr, count_E) * stack.scale


def _back(parts: Sequence[tuple[Tensor, _Stack, Tensor | None]], count_E: Tensor) -> Tensor:
    """The gradient of the stacks' common input: (gradient of a product, its stack, gradient of A x) each."""
    if all(isinstance(stack.weight, Tensor) for _, stack, _ in parts):
        terms = [Term(dy_NO, stack.weight, dlow_Nr, stack.a_ErI) for dy_NO, stack, dlow_Nr in parts]
        return sum_of_dense_terms(terms, count_E, back=True)
    total: Tensor | None = None
    for dy_NO, stack, dlow_Nr in parts:
        if isinstance(stack.weight, Packed):
            part_NI = packed_grouped_backward(dy_NO, stack.weight, count_E)
            if dlow_Nr is not None:
                part_NI += grouped_backward(dlow_Nr, stack.a_ErI, count_E)  # type: ignore[arg-type]
        else:
            part_NI = sum_of_dense_terms([Term(dy_NO, stack.weight, dlow_Nr, stack.a_ErI)], count_E, back=True)
        total = part_NI if total is None else total.add_(part_NI)
    assert total is not None
    return total


def _rows_of(bias_EO: Tensor, count_E: Tensor, rows: int) -> Tensor:
    """Each row's expert's bias, (N, O)."""
    return bias_EO.repeat_interleave(count_E, dim=0, output_size=rows)
