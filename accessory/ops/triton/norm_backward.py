"""The gradient of a root-mean-square norm and of the sum before it. A program takes some tokens, one after the other.

Legend: T tokens, D dim, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.ops.triton.card import on_its_card

PROGRAMS = 528  # four for each multiprocessor of an H100


@triton.jit(do_not_specialize=["T"])
def _norm_backward_kernel(
    x_ptr, norm_ptr, dh_ptr, dsum_ptr, dx_ptr, dnorm_ptr, T, eps,
    D: tl.constexpr, C: tl.constexpr, ADDS: tl.constexpr, LEARNS: tl.constexpr,
):  # fmt: skip
    """dx = the gradient of x / rms(x) · norm, plus dsum; and this program's part of that of norm."""
    col = tl.arange(0, C)
    norm = tl.load(norm_ptr + col, mask=col < D, other=0.0)
    dnorm = tl.zeros((C,), dtype=tl.float32)
    at = tl.program_id(0).to(tl.int64) * D + col
    for _ in range(tl.program_id(0), T, tl.num_programs(0)):
        x = tl.load(x_ptr + at, mask=col < D, other=0.0)
        dh = tl.load(dh_ptr + at, mask=col < D, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        x *= factor
        if LEARNS:
            dnorm += dh * x
        dh *= norm
        dx = factor * (dh - x * (tl.sum(dh * x, 0) / D))
        if ADDS:
            dx += tl.load(dsum_ptr + at, mask=col < D, other=0.0)
        tl.store(dx_ptr + at, dx, mask=col < D)
        at += tl.num_programs(0) * D
    if LEARNS:
        tl.store(dnorm_ptr + tl.program_id(0) * D + col, dnorm, mask=col < D)


@on_its_card
def norm_backward(
    x_TD: Tensor, norm_D: Tensor, eps: float, dh_TD: Tensor, dsum_TD: Tensor | None, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """(the gradient of x, that of the norm's weight), both fp32.

    x: what was normed, fp32. dh: the gradient of the result, of any dtype. dsum: that of x from elsewhere. learns:
    whether the weight's is wanted.
    """
    D = x_TD.shape[-1]
    T = x_TD.numel() // D
    dx_TD = torch.empty_like(x_TD)
    programs = min(max(T, 1), PROGRAMS)
    dnorm_PD = torch.empty(programs if learns else 0, D, dtype=torch.float32, device=x_TD.device)
    _norm_backward_kernel[(programs,)](
        x_TD, norm_D, dh_TD.contiguous(), x_TD if dsum_TD is None else dsum_TD.contiguous(), dx_TD,
        dnorm_PD if learns else norm_D, T, eps,
        D=D, C=triton.next_power_of_2(D), ADDS=dsum_TD is not None, LEARNS=learns, num_warps=8,
    )  # fmt: skip
    return dx_TD, dnorm_PD.sum(0) if learns else None
