"""What experts do beside their products for many tokens, a launch each: SiLU with its factor, and the sum over experts.

Legend: T tokens, K experts a token, N = T·K rows sorted by expert, D dim, F hidden dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.ops.triton.card import on_its_card


@triton.jit
def _gate_kernel(gate_ptr, up_ptr, h_ptr, SIZE, BLOCK: tl.constexpr):
    """h = silu(gate) · up, number by number."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < SIZE, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(h_ptr + at, (gate / (1.0 + tl.exp(-gate)) * up).to(h_ptr.dtype.element_ty), mask=at < SIZE)


@triton.jit(do_not_specialize=["T"])
def _combine_kernel(
    y_ptr, place_ptr, weight_ptr, rows_ptr, out_ptr, T, D: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out_TD = Σ_k weight · y[place], in the order of k. Places from `rows` on hold no product."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    rows = tl.load(rows_ptr)
    total = tl.zeros((COLS,), dtype=tl.float32)
    for k in tl.static_range(K):
        place = tl.load(place_ptr + token * K + k)
        held = place < rows
        part = tl.load(y_ptr + place * D + col, mask=(col < D) & held, other=0.0).to(tl.float32)
        total += tl.load(weight_ptr + token * K + k) * part
    tl.store(out_ptr + token * D + col, total, mask=col < D)


@on_its_card
def gate(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """silu(gate) · up, rounded once to gate's dtype."""
    gate_NF, up_NF = gate_NF.contiguous(), up_NF.contiguous()
    h_NF = torch.empty_like(gate_NF)
    block = 2048
    if h_NF.numel():
        _gate_kernel[(triton.cdiv(h_NF.numel(), block),)](gate_NF, up_NF, h_NF, h_NF.numel(), BLOCK=block, num_warps=4)
    return h_NF


@on_its_card
def combine(y_ND: Tensor, place_N: Tensor, weight_TK: Tensor, rows: Tensor) -> Tensor:
    """Σ_k weight_TK · y of each token's pairs: (T, D) fp32, always summed in the order of k.

    place_N: the row of y of each pair, int64; rows: how many rows of y have a product. The others add nothing.
    """
    (T, K), D = weight_TK.shape, y_ND.shape[1]
    out_TD = torch.empty(T, D, dtype=torch.float32, device=y_ND.device)
    cols = min(1024, triton.next_power_of_2(D))
    if T:
        _combine_kernel[(T, triton.cdiv(D, cols))](
            y_ND.contiguous(), place_N, weight_TK.contiguous(), rows, out_TD, T, D=D, K=K, COLS=cols, num_warps=4
        )
    return out_TD
