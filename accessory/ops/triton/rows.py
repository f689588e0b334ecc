"""A dense weight times a few rows: the weight is read once, at the rate of a copy, without tensor cores.

Legend: T tokens, OUT out and IN in features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.ops.triton.card import cdiv, on_its_card
from accessory.ops.triton.overlap import let_next_begin, overlap, wait_for_inputs


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, y_ptr, T, OUT: tl.constexpr, IN: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, OVERLAPS: tl.constexpr = False,
):  # fmt: skip
    """y_TO = x_TI Wᵀ, ROWS outputs of all tokens."""
    wait_for_inputs(OVERLAPS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, TOKENS)
    sums = tl.zeros((ROWS, TOKENS, COLS), dtype=tl.float32)
    for start in range(0, IN, COLS):
        col = start + tl.arange(0, COLS)
        at = w_ptr + row[:, None].to(tl.int64) * IN + col[None, :]
        w = tl.load(at, mask=(row < OUT)[:, None] & (col < IN)[None, :], other=0.0).to(tl.float32)
        x = tl.load(x_ptr + t[:, None] * IN + col[None, :], mask=(t < T)[:, None] & (col < IN)[None, :], other=0.0)
        sums += w[:, None, :] * x.to(tl.float32)[None, :, :]
    let_next_begin(OVERLAPS)
    y = tl.sum(sums, 2)
    cell = (row < OUT)[:, None] & (t < T)[None, :]
    tl.store(y_ptr + t[None, :] * OUT + row[:, None], y.to(y_ptr.dtype.element_ty), mask=cell)


# (rows, columns, warps) of a program by the number of tokens.
TILES = {1: (2, 2048, 4), 2: (2, 1024, 4), 4: (2, 1024, 4)}


@on_its_card
def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """x (T, I) times a dense weight (O, I): (T, O) in x's dtype, summed in fp32. T is at most 4."""
    (T, I), O = x_TI.shape, len(weight_OI)  # noqa: E741
    x_TI, weight_OI = x_TI.contiguous(), weight_OI.contiguous()
    tokens = triton.next_power_of_2(T)
    rows, cols, warps = TILES[tokens]
    y_TO = torch.empty(T, O, dtype=x_TI.dtype, device=x_TI.device)
    _linear_kernel[(cdiv(O, rows),)](
        x_TI, weight_OI, y_TO, T, OUT=O, IN=I, TOKENS=tokens, ROWS=rows, COLS=min(cols, triton.next_power_of_2(I)),
        num_warps=warps, **overlap(x_TI),
    )  # fmt: skip
    return y_TO
