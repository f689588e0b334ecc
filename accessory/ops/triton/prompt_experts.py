"""What experts do beside their products for many tokens, a launch each: SiLU with its factor, its gradients, and the
sum over experts.

Legend: T tokens, K experts a token, N = T·K rows sorted by expert, D dim, F hidden dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.ops.triton.card import cdiv, on_its_card


@triton.jit
def _gate_kernel(gate_ptr, up_ptr, h_ptr, SIZE, BLOCK: tl.constexpr):
    """h = silu(gate) · up, number by number."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < SIZE, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(h_ptr + at, (gate / (1.0 + tl.exp(-gate)) * up).to(h_ptr.dtype.element_ty), mask=at < SIZE)


@triton.jit
def _gate_backward_kernel(
    gate_ptr, up_ptr, dh_ptr, weight_ptr, dweight_ptr, F: tl.constexpr, COLS: tl.constexpr, WRITES_H: tl.constexpr
):
    """One row: the gradients of gate and up take their places, and that of the row's weight is written.

    dh is the gradient of h = silu(gate) · up before the row's weight; with WRITES_H weight · h takes its place.
    """
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + row).to(tl.float32)
    dot = tl.zeros((COLS,), dtype=tl.float32)
    for start in range(0, F, COLS):
        at = row * F + start + tl.arange(0, COLS)
        held = start + tl.arange(0, COLS) < F
        gate = tl.load(gate_ptr + at, mask=held, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=held, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + at, mask=held, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        dot += dh * silu * up
        dh *= weight
        kind = gate_ptr.dtype.element_ty
        tl.store(gate_ptr + at, (dh * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(kind), mask=held)
        tl.store(up_ptr + at, (dh * silu).to(kind), mask=held)
        if WRITES_H:
            tl.store(dh_ptr + at, (weight * silu * up).to(kind), mask=held)
    tl.store(dweight_ptr + row, tl.sum(dot, 0))


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
        _gate_kernel[(cdiv(h_NF.numel(), block),)](gate_NF, up_NF, h_NF, h_NF.numel(), BLOCK=block, num_warps=4)
    return h_NF


@on_its_card
def gate_backward(gate_NF: Tensor, up_NF: Tensor, dh_NF: Tensor, weight_N: Tensor, writes_h: bool) -> Tensor:
    """`ops.experts_autograd.gate_backward` in one pass over memory."""
    assert all(t.is_contiguous() for t in (gate_NF, up_NF, dh_NF)), "they are written in place"
    N, F = gate_NF.shape
    dweight_N = torch.empty(N, dtype=torch.float32, device=gate_NF.device)
    if N:
        _gate_backward_kernel[(N,)](
            gate_NF, up_NF, dh_NF, weight_N.contiguous(), dweight_N,
            F=F, COLS=min(2048, triton.next_power_of_2(F)), WRITES_H=writes_h, num_warps=8,
        )  # fmt: skip
    return dweight_N


@on_its_card
def combine(y_ND: Tensor, place_N: Tensor, weight_TK: Tensor, rows: Tensor) -> Tensor:
    """Σ_k weight_TK · y of each token's pairs: (T, D) fp32, always summed in the order of k.

    place_N: the row of y of each pair, int64; rows: how many rows of y have a product. The others add nothing.
    """
    (T, K), D = weight_TK.shape, y_ND.shape[1]
    out_TD = torch.empty(T, D, dtype=torch.float32, device=y_ND.device)
    cols = min(1024, triton.next_power_of_2(D))
    if T:
        _combine_kernel[(T, cdiv(D, cols))](
            y_ND.contiguous(), place_N, weight_TK.contiguous(), rows, out_TD, T, D=D, K=K, COLS=cols, num_warps=4
        )
    return out_TD
