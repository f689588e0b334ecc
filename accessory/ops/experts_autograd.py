"""The experts' feed-forward in training: all experts as grouped products, forward and backward, as one operation.

Of the activations only the pre-activations w1 x and w3 x are kept, or, where the layer is computed again, nothing but
the input: SwiGLU is computed again in backward, and w2's product is not needed there at all. The gradient of a routing
weight is ⟨dy, w2 h⟩ = ⟨w2ᵀ dy, h⟩, where dy is the gradient of the weighted sum. So neither the experts' results nor
their gradients times the weights are kept.

A stack may be dense or quantised, trained or frozen, with a bias and a LoRA adapter. Adapters stay products of low
rank: their parts are added to the large products, and no update of a weight is ever built.

Legend: T tokens, K experts a token, N (token, expert) pairs sorted by expert, E experts, D dim, F hidden dim, r rank,
O out, I in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accessory.ops import dispatch
from accessory.ops.compute_copy import in_dtype
from accessory.ops.dense_products import Term, grouped_backward, grouped_dense, grouped_weight_gradient, sort_by_expert
from accessory.ops.dense_products import sum_of_terms as sum_of_dense_terms
from accessory.ops.experts import combine, gate
from accessory.ops.linear import Weight
from accessory.ops.quantized import Packed
from accessory.ops.quantized_products import dequantized_for_products, packed_grouped, packed_grouped_backward

_OPS: Sequence[dispatch.Op] = ("grouped", "grouped_backward", "grouped_weights")
MANY = 2**20  # rows: kernels for few rows need the host less than those for many
STACKS = 3  # w1, w2, w3
FIELDS = 4  # of each: the dense weight, the bias, A and B


class _Plan(NamedTuple):
    """What of a call is no tensor with a gradient."""

    packed: Sequence[Packed | None]  # w1, w2, w3 where they are quantised
    scales: Sequence[float]  # of their LoRA adapters
    first: int | None
    recompute: bool


def trained_experts(
    x_TD: Tensor,
    w1_EFD: Weight,
    w2_EDF: Weight,
    w3_EFD: Weight,
    weight_TK: Tensor,
    expert_TK: Tensor,
    first: int | None = None,
    recompute: bool = False,
) -> Tensor:
    """`ops.experts.grouped_experts` with gradients, (T, D) fp32; `backward` works once.

    first: the weights are those of the experts `first … first + E - 1`, and the host waits to learn how many pairs they
    got, so that no memory is taken for the others. recompute: keep the input only.
    """
    weights = (w1_EFD, w2_EDF, w3_EFD)
    fields: list[Tensor | None] = []
    for w in weights:
        fields += [w.weight if isinstance(w.weight, Tensor) else None, w.bias, w.lora_a, w.lora_b]
    packed = [w.weight if isinstance(w.weight, Packed) else None for w in weights]
    plan = _Plan(packed, [w.lora_scale for w in weights], first, recompute)
    return _Experts.apply(x_TD, weight_TK, expert_TK, plan, *fields)


class _Stack(NamedTuple):
    """A stack of weights in the dtype of the products."""

    weight: Any  # Tensor or Packed
    bias_EO: Tensor | None
    a_ErI: Tensor | None
    b_EOr: Tensor | None
    scale: float


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, plan: _Plan, *fields: Any) -> Tensor:
        w1, w2, w3 = _stacks(plan, fields, x_TD.dtype)
        order_N, count_E = sort_by_expert(expert_TK, w1.weight.shape[0], plan.first or 0)
        if plan.first is not None:
            order_N = order_N[: int(count_E.sum())]
        x_ND = x_TD[order_N // expert_TK.shape[1]]
        gate_NF, low1_Nr = _product(x_ND, w1, count_E)
        up_NF, low3_Nr = _product(x_ND, w3, count_E)
        del x_ND
        h_NF = gate(gate_NF, up_NF)
        kept = (None,) * STACKS if plan.recompute else (w1.weight, w2.weight, w3.weight)
        inner = (None,) * 4 if plan.recompute else (gate_NF, up_NF, low1_Nr, low3_Nr)
        ctx.plan, ctx.kept, ctx.inner, ctx.fields = plan, kept, inner, fields
        ctx.save_for_backward(x_TD, weight_TK, order_N, count_E)
        del gate_NF, up_NF, inner
        y_ND, _ = _product(h_NF, w2, count_E)
        return combine(y_ND, order_N, weight_TK, None if plan.first is None else count_E.sum())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.plan is None:
            raise RuntimeError("backward of the experts works once: it writes over what forward kept")
        x_TD, weight_TK, order_N, count_E = ctx.saved_tensors
        plan, kept, inner, fields = ctx.plan, ctx.kept, ctx.inner, ctx.fields
        ctx.plan = ctx.kept = ctx.inner = ctx.fields = None
        wanted = ctx.needs_input_grad[4:]
        w1, w2, w3 = _stacks(plan, fields, x_TD.dtype, kept)
        del kept
        token_N, weight_N = order_N // weight_TK.shape[1], weight_TK.flatten()[order_N]
        dy_ND = grads[0].to(x_TD.dtype)[token_N]
        found = _Gradients(fields, wanted, count_E)

        dlow2_Nr = _into_low(dy_ND, w2, count_E)
        dh_NF = _back([(dy_ND, w2, dlow2_Nr)], count_E)
        w2 = w2._replace(weight=None)  # its copy is given back
        x_ND = x_TD[token_N]
        gate_NF, up_NF, low1_Nr, low3_Nr = inner
        del inner
        if gate_NF is None:
            # The last one read here is the first one read below, so it stays dequantised.
            if isinstance(w3.weight, Packed):
                w3 = w3._replace(weight=dequantized_for_products(w3.weight, x_ND))
            gate_NF, low1_Nr = _product(x_ND, w1, count_E)
            up_NF, low3_Nr = _product(x_ND, w3, count_E)
        of_w2 = any(wanted[FIELDS : 2 * FIELDS])
        gate_NF, up_NF, dh_NF, dweight_N = gate_backward(gate_NF, up_NF, dh_NF, weight_N, of_w2)
        if w2.bias_EO is not None:
            dweight_N += (dy_ND.float() * _rows_of(w2.bias_EO, count_E, len(dy_ND)).float()).sum(-1)
        if of_w2:  # dh holds each row's weight times h
            low2_Nr = None if w2.a_ErI is None else grouped_dense(dh_NF, w2.a_ErI, count_E) * w2.scale
            found.add(1, dy_ND, dh_NF, low2_Nr, dlow2_Nr, weight_N)
        del dh_NF, dy_ND
        dlow1_Nr, dlow3_Nr = _into_low(gate_NF, w1, count_E), _into_low(up_NF, w3, count_E)
        found.add(0, gate_NF, x_ND, low1_Nr, dlow1_Nr)
        found.add(2, up_NF, x_ND, low3_Nr, dlow3_Nr)
        del x_ND
        dx_TD = None
        if ctx.needs_input_grad[0]:
            dx_ND = _back([(up_NF, w3, dlow3_Nr), (gate_NF, w1, dlow1_Nr)], count_E)
            del gate_NF, up_NF
            rows = None if plan.first is None else count_E.sum()
            dx_TD = combine(dx_ND, order_N, torch.ones_like(weight_TK), rows).to(x_TD.dtype)
        dweight = dweight_N.new_zeros(weight_TK.numel()).scatter_(0, order_N, dweight_N)
        return dx_TD, dweight.view_as(weight_TK).to(weight_TK.dtype), None, None, *found.gradients


def runs_host_free(dtype: torch.dtype, device: torch.device, weights: Sequence[Weight]) -> bool:
    """Whether both passes run without the host learning the routing. A CUDA graph needs that."""
    return all(
        dispatch.choose(dispatch.product(op, torch.empty(0, device=device, dtype=dtype), stack, MANY)).host_free
        for w in weights
        for stack in (w.weight, w.lora_a, w.lora_b)
        if stack is not None
        for op in (_OPS if isinstance(stack, Tensor) else _OPS[:2])
    )


def gate_backward(
    gate_NF: Tensor, up_NF: Tensor, dh_NF: Tensor, weight_N: Tensor, writes_h: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of weight · silu(gate) ⊙ up, where dh is that of silu(gate) ⊙ up alone.

    Returns those of gate and up, weight · h in dh's dtype (with `writes_h`; else anything), and the weights' (N,) fp32.
    May write over its inputs.
    """
    kernel = dispatch.find(dispatch.over_tokens("gate_backward", gate_NF))
    if kernel is not None:
        return kernel.load()(gate_NF, up_NF, dh_NF, weight_N, writes_h)  # type: ignore[return-value]
    g_NF, u_NF, weight_N1 = gate_NF.float(), up_NF.float(), weight_N.float()[:, None]
    sigmoid_NF = g_NF.sigmoid()
    silu_NF = g_NF * sigmoid_NF
    dweight_N = (dh_NF.float() * silu_NF * u_NF).sum(-1)
    d_NF, dtype = dh_NF.float() * weight_N1, gate_NF.dtype
    dgate_NF = d_NF * u_NF * sigmoid_NF * (1 + g_NF * (1 - sigmoid_NF))
    h_NF = (weight_N1 * silu_NF * u_NF).to(dtype) if writes_h else dh_NF
    return dgate_NF.to(dtype), (d_NF * silu_NF).to(dtype), h_NF, dweight_N


class _Gradients:
    """The gradients of the stacks' fields, in the order of the operation's inputs."""

    def __init__(self, fields: Sequence[Tensor | None], wanted: Sequence[bool], count_E: Tensor) -> None:
        self.fields, self.wanted, self.count_E = fields, wanted, count_E
        self.gradients: list[Tensor | None] = [None] * len(fields)

    def add(
        self, stack: int, dy_NO: Tensor, x_NI: Tensor, low_Nr: Tensor | None, dlow_Nr: Tensor | None,
        weight_N: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Those of a stack: dy is its product's gradient, x its input. weight_N: of rows whose dy lacks the factor."""
        self._set(stack, 0, dy_NO, x_NI)
        if self.wanted[stack * FIELDS + 1]:
            ones_N = torch.ones(len(dy_NO), device=dy_NO.device) if weight_N is None else weight_N
            column_N8 = ones_N.to(dy_NO.dtype)[:, None].expand(-1, 8).contiguous()  # kernels take eight at least
            dtype = self.fields[stack * FIELDS + 1].dtype  # type: ignore[union-attr]
            self.gradients[stack * FIELDS + 1] = grouped_weight_gradient(dy_NO, column_N8, self.count_E, torch.float32)[
                ..., 0
            ].to(dtype)
        if low_Nr is not None and dlow_Nr is not None:
            self._set(stack, 2, dlow_Nr, x_NI)
            self._set(stack, 3, dy_NO, low_Nr)

    def _set(self, stack: int, field: int, dy_NO: Tensor, x_NI: Tensor) -> None:
        at = stack * FIELDS + field
        if not self.wanted[at]:
            return
        parameter = self.fields[at]
        assert parameter is not None
        dtype = _dtype_of_gradient(parameter)
        if _takes_sums(parameter):
            # Written on top of the earlier micro-batches' gradient: autograd would make one and add it.
            adds = not getattr(parameter, "gradient_is_stale", False)
            grouped_weight_gradient(dy_NO, x_NI, self.count_E, dtype, parameter.grad, adds=adds)
            parameter.gradient_is_stale = False  # type: ignore[attr-defined]
        else:
            self.gradients[at] = grouped_weight_gradient(dy_NO, x_NI, self.count_E, dtype)


def _takes_sums(parameter: Tensor) -> bool:
    """Whether a gradient may be added to the parameter's own, past autograd: nothing waits for it there."""
    grad = parameter.grad if parameter.is_leaf else None
    if grad is None or type(grad) is not Tensor or not grad.is_contiguous():
        return False
    if grad.dtype != _dtype_of_gradient(parameter):
        return False
    return not parameter._backward_hooks and not getattr(parameter, "_post_accumulate_grad_hooks", None)


def _dtype_of_gradient(parameter: Tensor) -> torch.dtype:
    """The dtype in which the parameter keeps its gradient: its own, unless it asks for another."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype if parameter.is_leaf else parameter.dtype


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
        stacks.append(_Stack(weight, cast(bias), cast(a), cast(b), plan.scales[n]))
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
        y_NO = y_NO + _rows_of(stack.bias_EO, count_E, len(x_NI))
    return y_NO, low_Nr


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
