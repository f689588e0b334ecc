"""`ops.norm.add_rms_norm` in training on a GPU: a launch forward and one back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accessory.ops.norm import Exchange


def add_rms_norm(
    x: Tensor, y: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype, exchange: Exchange | None = None
) -> tuple[Tensor, Tensor]:
    """`ops.norm.add_rms_norm` with gradients."""
    assert exchange is None, "gradients are summed by autograd"
    return _AddNorm.apply(x, y, weight_D, eps, dtype)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        from accessory.ops.triton.add_norm import add_rms_norm as kernel

        total, h = kernel(x, y, weight_D, eps, dtype)
        ctx.eps, ctx.y_dtype = eps, None if y is None else y.dtype
        ctx.save_for_backward(total, weight_D)
        ctx.set_materialize_grads(False)
        return total.view_as(total) if total is x else total, h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from accessory.ops.triton.norm_backward import norm_backward

        total, weight_D = ctx.saved_tensors
        dtotal, dh = grads
        if dh is None:
            dx, dweight_D = dtotal, None
        else:
            dx, dweight_D = norm_backward(total, weight_D, ctx.eps, dh, dtotal, ctx.needs_input_grad[2])
        dy = None if ctx.y_dtype is None or dx is None else dx.to(ctx.y_dtype)
        return dx, dy, dweight_D, None, None
