"""Products with quantised weights, forward and backward. The weights are frozen; gradients flow to the input.

`ops.dispatch` chooses the kernel. Some kernels read the quantised weight directly. Some dequantise it tile by tile
inside the product. The functions below dequantise it before the product. None of them keeps the dequantised weight.

Legend: T tokens, N rows sorted by expert, E experts, O out, I in features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accessory.ops import dispatch
from accessory.ops.dense_products import by_expert, dense_linear, grouped_backward, grouped_dense
from accessory.ops.quantized import Packed


def packed_linear(x: Tensor, packed: Packed) -> Tensor:
    """x (…, I) times a quantised weight, (…, O) in x's dtype. Gradients are exact for the dequantised weight."""
    x_TI = x.reshape(-1, x.shape[-1])
    y_TO = _FrozenLinear.apply(x_TI, packed) if torch.is_grad_enabled() else _linear(x_TI, packed)
    return y_TO.view(*x.shape[:-1], packed.shape[-2])  # not -1: an expert may get no rows


def packed_grouped(x_NI: Tensor, packed: Packed, count_E: Tensor, *, grad: bool | None = None) -> Tensor:
    """Rows of x, sorted by expert, times their expert's quantised weight: (N, O) in x's dtype.

    autograd does not follow it: `packed_grouped_backward` gives the gradient of the rows. grad: whether the kernel must
    be one that training may use, by default where gradients are recorded.
    """
    kernel = dispatch.choose(dispatch.product("grouped", x_NI, packed, len(x_NI), grad=grad))
    return kernel.load()(x_NI, packed, count_E)


def packed_grouped_backward(dy_NO: Tensor, packed: Packed, count_E: Tensor) -> Tensor:
    """The gradient of `packed_grouped`'s rows, (N, I) in dy's dtype."""
    kernel = dispatch.choose(dispatch.product("grouped_backward", dy_NO, packed, len(dy_NO)))
    return kernel.load()(dy_NO, packed, count_E)


def dequantized(packed: Packed, dtype: torch.dtype) -> Tensor:
    """`quantized.dequantize` with the quickest kernel of the weight's device: (…, O, I) in `dtype`."""
    kernel = dispatch.choose(dispatch.product("dequantize", packed.data, packed, 0)._replace(dtype="bfloat16"))
    return kernel.load()(packed, dtype)


def _linear(x_TI: Tensor, packed: Packed, grad: bool = False) -> Tensor:
    return dispatch.choose(dispatch.product("linear", x_TI, packed, len(x_TI), grad=grad)).load()(x_TI, packed)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        # torch switches gradients off inside `forward`, but the kernel must be one that training may use.
        return _linear(x_TI, packed, grad=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dy_TO = grads[0]
        kernel = dispatch.choose(dispatch.product("linear_backward", dy_TO, ctx.packed, len(dy_TO)))
        return kernel.load()(dy_TO, ctx.packed), None


def multiplied_dequantized(packed: Packed, x: Tensor, rows: int) -> bool:
    """Whether products of `rows` rows in x's dtype dequantise the whole stack first."""
    kernel = dispatch.choose(dispatch.product("grouped", x, packed, rows, grad=True))
    return kernel.function.endswith(":dequantized_grouped")


def dequantized_for_products(packed: Packed, x: Tensor, rows: int) -> Tensor | Packed:
    """The stack in x's dtype, where products of so many rows would dequantise it each; else the stack itself."""
    return dequantized(packed, x.dtype) if multiplied_dequantized(packed, x, rows) else packed


# --------------------------------------------------------------------------- dequantised before the product


def dequantized_linear(x_TI: Tensor, packed: Packed) -> Tensor:
    return dense_linear(x_TI, dequantized(packed, x_TI.dtype))


def dequantized_linear_backward(dy_TO: Tensor, packed: Packed) -> Tensor:
    return dy_TO @ dequantized(packed, dy_TO.dtype)


def dequantized_grouped(x_NI: Tensor, packed: Packed, count_E: Tensor) -> Tensor:
    return grouped_dense(x_NI, dequantized(packed, x_NI.dtype), count_E)


def dequantized_grouped_backward(dy_NO: Tensor, packed: Packed, count_E: Tensor) -> Tensor:
    return grouped_backward(dy_NO, dequantized(packed, dy_NO.dtype), count_E)


def expert_by_expert(x_NI: Tensor, packed: Packed, count_E: Tensor) -> Tensor:
    """A loop over the experts that got rows. Only one dequantised expert is in memory at a time."""
    return _each(x_NI, packed, count_E, _linear, packed.shape[1])


def expert_by_expert_backward(dy_NO: Tensor, packed: Packed, count_E: Tensor) -> Tensor:
    return _each(dy_NO, packed, count_E, dequantized_linear_backward, packed.shape[2])


def _each(
    a_NR: Tensor, packed: Packed, count_E: Tensor, function: Callable[[Tensor, Packed], Tensor], width: int
) -> Tensor:
    *runs, others = by_expert(a_NR, count_E)
    products = [function(a, packed[e]) for e, a in enumerate(runs) if len(a)]
    return torch.cat([*products, a_NR.new_zeros(len(others), width)])
