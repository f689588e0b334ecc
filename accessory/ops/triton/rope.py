"""Rotary position embedding of queries and keys in one pass over memory, forward and back.

Legend: N tokens, H heads, d head_dim, c = d/2 pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.ops.triton.card import cdiv, on_its_card


@triton.jit
def _turn_kernel(
    x_ptr, rotation_ptr, out_ptr, H: tl.constexpr, c: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """The pairs (x, y) of some heads of a token, times cos + i sin; with BACK times its conjugate."""
    token = tl.program_id(0).to(tl.int64)
    head, pair, number = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS)
    cos = tl.load(rotation_ptr + (token * c + pair) * 2, mask=pair < c, other=0.0)[None, :]
    sin = tl.load(rotation_ptr + (token * c + pair) * 2 + 1, mask=pair < c, other=0.0)[None, :]
    if BACK:
        sin = -sin
    at = token * H * c * 2 + head[:, None] * (c * 2) + number[None, :]
    held = (head[:, None] < H) & (number[None, :] < 2 * c)
    both = tl.load(x_ptr + at, mask=held, other=0.0).to(tl.float32)  # as wide as memory gives them
    x, y = tl.split(tl.reshape(both, (HEADS, PAIRS, 2)))
    turned = tl.interleave(x * cos - y * sin, x * sin + y * cos)
    tl.store(out_ptr + at, turned.to(out_ptr.dtype.element_ty), mask=held)


@on_its_card
def turn(x_NHd: Tensor, rotation_Nc2: Tensor, back: bool) -> Tensor:
    """Each interleaved pair turned by its token's angle, or back; in x's dtype. rotation: fp32, cos and sin."""
    x_NHd = x_NHd.contiguous()
    N, H, d = x_NHd.shape
    out_NHd = torch.empty_like(x_NHd)
    if N:
        heads, pairs = min(16, triton.next_power_of_2(H)), triton.next_power_of_2(d // 2)
        _turn_kernel[(N, cdiv(H, heads))](
            x_NHd, rotation_Nc2, out_NHd, H=H, c=d // 2, HEADS=heads, PAIRS=pairs, BACK=back, num_warps=4
        )
    return out_NHd
