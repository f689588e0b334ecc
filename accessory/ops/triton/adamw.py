"""AdamW (arXiv 1711.05101) in one pass over memory: weight, gradient and both moments are read, and all but the
gradient written, the weight in 16 bits too where products read such a copy.

Legend: N numbers, in fp32 where nothing else is said. A program updates BLOCK of them.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from accessory.ops.triton.card import cdiv, on_its_card

BLOCK = 1024


@triton.jit
def _adamw_kernel(
    weight_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, scale_ptr, N,
    kept, beta1, beta2, step, correction, eps,
    COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight · kept - step · m / (√v · correction + eps), with the moments m and v of scale · gradient. The copy is the
    new weight, rounded. Where the scale is NaN, nothing is written."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != scale:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = at < N
    gradient = tl.load(gradient_ptr + at, mask=held, other=0.0).to(tl.float32) * scale
    exp_avg = tl.load(exp_avg_ptr + at, mask=held, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=held, other=0.0)
    weight = tl.load(weight_ptr + at, mask=held, other=0.0)
    # beta · m + (1 - beta) · gradient, in the form that torch's fused kernel has.
    exp_avg = beta1 * exp_avg + (gradient - beta1 * gradient)
    square = gradient * gradient
    exp_avg_sq = beta2 * exp_avg_sq + (square - beta2 * square)
    change = tl.div_rn(step * exp_avg, tl.sqrt_rn(exp_avg_sq) * correction + eps)
    weight = weight * kept - change
    tl.store(weight_ptr + at, weight, mask=held)
    tl.store(exp_avg_ptr + at, exp_avg, mask=held)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=held)
    if COPIES:
        tl.store(copy_ptr + at, weight.to(copy_ptr.dtype.element_ty), mask=held)


@on_its_card
def update(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, copy: Tensor | None = None, *, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float, updates: int, scale: Tensor,
) -> None:  # fmt: skip
    """Move `weight` by its gradient times `scale`, the update number `updates` from 1. NaN moves nothing.

    weight and moments: fp32, of one shape, contiguous, changed in place. gradient: of any dtype. copy: takes the new
    weight, rounded to its dtype. scale: one number of any floating dtype, which the host does not read.
    """
    tensors = [weight, exp_avg, exp_avg_sq, *([] if copy is None else [copy])]
    assert all(t.is_contiguous() and t.shape == gradient.shape for t in tensors), "numbers are paired by their place"
    N = weight.numel()
    if not N:
        return
    # Powers of the betas are computed in Python: close to 1, fp32 would round their distance from it.
    beta1, beta2 = betas
    step = lr / (1 - beta1**updates)
    correction = 1 / math.sqrt(1 - beta2**updates)
    _adamw_kernel[(cdiv(N, BLOCK),)](
        weight, gradient.contiguous(), exp_avg, exp_avg_sq, weight if copy is None else copy, scale, N,
        1 - lr * weight_decay, beta1, beta2, step, correction, eps,
        COPIES=copy is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
