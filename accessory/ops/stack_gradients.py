"""The gradients of stacks of weights, summed over pieces of rows, and written past autograd where nothing waits there.

Legend: N rows sorted by expert, E experts, O out, I in features, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accessory.ops.dense_products import grouped_weight_gradient
from accessory.ops.gradient_squares import squares_for

FIELDS = 4  # of a stack: the dense weight, the bias, A and B


class StackGradients:
    """The gradients of the stacks' fields, in the order of the operation's inputs.

    Each piece of rows is written on top of those before. So an expert whose rows lie in two pieces has its gradient
    rounded once more, where it is kept in 16 bits.
    """

    def __init__(self, fields: Sequence[Tensor | None], wanted: Sequence[bool]) -> None:
        self.fields, self.wanted = fields, wanted
        self.gradients: list[Tensor | None] = [None] * len(fields)

    def wants(self, stack: int) -> bool:
        return any(self.wanted[stack * FIELDS : (stack + 1) * FIELDS])

    def add(
        self, stack: int, dy_NO: Tensor, x_NI: Tensor, low_Nr: Tensor | None, dlow_Nr: Tensor | None, count_E: Tensor,
        weight_N: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Those of a stack: dy is its product's gradient, x its input. weight_N: of rows whose dy lacks the factor."""
        self._add(stack, 0, dy_NO, x_NI, count_E)
        at = stack * FIELDS + 1
        if self.wanted[at]:
            ones_N = torch.ones(len(dy_NO), device=dy_NO.device) if weight_N is None else weight_N
            column_N8 = ones_N.to(dy_NO.dtype)[:, None].expand(-1, 8).contiguous()  # kernels take eight at least
            sum_EO = grouped_weight_gradient(dy_NO, column_N8, count_E, torch.float32)[..., 0]
            sum_EO, before_EO = sum_EO.to(self.fields[at].dtype), self.gradients[at]  # type: ignore[union-attr]
            self.gradients[at] = sum_EO if before_EO is None else before_EO.add_(sum_EO)
        if low_Nr is not None and dlow_Nr is not None:
            self._add(stack, 2, dlow_Nr, x_NI, count_E)
            self._add(stack, 3, dy_NO, low_Nr, count_E)

    def _add(self, stack: int, field: int, dy_NO: Tensor, x_NI: Tensor, count_E: Tensor) -> None:
        at = stack * FIELDS + field
        if not self.wanted[at]:
            return
        parameter = self.fields[at]
        assert parameter is not None
        dtype, squares = _dtype_of_gradient(parameter), squares_for(parameter)
        if _takes_sums(parameter):
            # Written on top of the earlier micro-batches' gradient: autograd would make one and add it.
            adds = not getattr(parameter, "gradient_is_stale", False)
            grouped_weight_gradient(dy_NO, x_NI, count_E, dtype, parameter.grad, adds=adds, squares=squares)
            parameter.gradient_is_stale = False  # type: ignore[attr-defined]
        else:
            before = self.gradients[at]
            self.gradients[at] = grouped_weight_gradient(dy_NO, x_NI, count_E, dtype, before, squares=squares)


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
