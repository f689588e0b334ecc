"""Products of one input with several weights, differentiated together.

The input's gradient is one sum, and comes first: where ranks have a part of it each, it is summed over them while the
weights' gradients are made.

Legend: T tokens, I in features, O out features of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Begins to sum a gradient over ranks, in place. What it returns has the caller's next operations wait for the sum.
SumOverRanks = Callable[[Tensor], Callable[[], object]]


def projections(x: Tensor, weights: Sequence[Tensor], sum_over_ranks: SumOverRanks | None = None) -> tuple[Tensor, ...]:
    """x (…, I) times each weight (O, I): (…, O) each. All have one dtype. sum_over_ranks: for the input's gradient."""
    parts = _Projections.apply(sum_over_ranks, x.reshape(-1, x.shape[-1]), *weights)
    return tuple(part.view(*x.shape[:-1], -1) for part in parts)


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sum_over_ranks: SumOverRanks | None, x_TI: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.sum_over_ranks = sum_over_ranks
        ctx.save_for_backward(x_TI, *weights)
        return tuple(F.linear(x_TI, weight_OI) for weight_OI in weights)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, *weights = ctx.saved_tensors
        _, wants_x, *wanted = ctx.needs_input_grad
        dx_TI, wait = None, None
        if wants_x:
            dx_TI = dys[0] @ weights[0]
            for dy_TO, weight_OI in zip(dys[1:], weights[1:], strict=True):
                dx_TI.addmm_(dy_TO, weight_OI)
            if ctx.sum_over_ranks is not None:
                wait = ctx.sum_over_ranks(dx_TI)
        gradients = [dy_TO.t() @ x_TI if wants else None for dy_TO, wants in zip(dys, wanted, strict=True)]
        if wait is not None:
            wait()
        return None, dx_TI, *gradients
