"""The residual stream on a GPU: adds a layer's output, norms the sum and, before the experts, routes it. One launch.

A program takes one token: first the sum of squares and the router's products, then the normed numbers. The router's
products need no norm: a row's norm is one factor, which is applied to their sums.

Several ranks of one host sum the layer's output in the same launch. Each sends its part to the others' inboxes (see
`ops.norm.Exchange`) and takes theirs out of its own. Turns alternate between two halves of an inbox: a rank that sends
its second part after another's first has seen that first one, so the other is done with what came before. This is the
protocol LL of NCCL: a word carries a number and its turn, hence no barrier and no fence is needed.

Legend: T tokens, D dim, E experts, K experts a token, C columns at a time, W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.ops.norm import Exchange
from accessory.ops.triton.card import on_its_card
from accessory.ops.triton.overlap import let_next_begin, overlap, wait_for_inputs


@triton.jit
def _summed(
    part, inbox_ptr, turn_ptr, token, col, D: tl.constexpr, RANK: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The sum of all ranks' parts of a token's row, in the order of ranks, so that all get the same."""
    turn = tl.load(turn_ptr + token) + 1
    half = (turn & 1) * (W * ROWS * D)
    at = half + token * D + col
    word = (part.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (turn.to(tl.int64) << 32)
    for rank in tl.static_range(W):
        if rank != RANK:
            inbox = tl.load(inbox_ptr + rank).to(tl.pointer_type(tl.int64))
            tl.store(inbox + at + RANK * (ROWS * D), word, mask=col < D, cache_modifier=".wt")
    total = tl.zeros_like(part)
    for rank in tl.static_range(W):
        if rank == RANK:
            total += part
        else:
            come = tl.load(inbox_ptr + RANK).to(tl.pointer_type(tl.int64)) + at + rank * (ROWS * D)
            word = tl.load(come, mask=col < D, other=0, volatile=True)
            while tl.sum(((word >> 32).to(tl.int32) != turn).to(tl.int32) * (col < D).to(tl.int32), 0) > 0:
                word = tl.load(come, mask=col < D, other=0, volatile=True)
            total += word.to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(turn_ptr + token, turn)
    return total


def _kernel_name(found: Any) -> str:
    """The name that profiles show: where ranks exchange, the kernel's time is also that of communication."""
    return "_exchange_add_norm_kernel" if found.constants["W"] > 1 else "_add_norm_kernel"


@triton.jit(repr=_kernel_name)
def _add_norm_kernel(
    x_ptr, y_ptr, norm_ptr, gate_ptr, sum_ptr, h_ptr, weight_ptr, expert_ptr, inbox_ptr, turn_ptr, eps,
    D: tl.constexpr, C: tl.constexpr, E: tl.constexpr, EXPERTS: tl.constexpr, K: tl.constexpr, KS: tl.constexpr,
    ADDS: tl.constexpr, ROUTES: tl.constexpr, RANK: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):  # fmt: skip
    """sum = x + y; h = sum / rms(sum) · norm; the K experts with the largest logits h · gate, and their weights."""
    let_next_begin(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C)
    e = tl.arange(0, EXPERTS)
    squares = tl.zeros((C,), dtype=tl.float32)
    products = tl.zeros((EXPERTS, C), dtype=tl.float32)
    for start in tl.static_range(0, D, C):
        col = start + c
        x = tl.load(x_ptr + token * D + col, mask=col < D, other=0.0)
        if ADDS:
            y = tl.load(y_ptr + token * D + col, mask=col < D, other=0.0).to(tl.float32)
            x += _summed(y, inbox_ptr, turn_ptr, token, col, D, RANK, W, ROWS) if W > 1 else y
            tl.store(sum_ptr + token * D + col, x, mask=col < D)
        squares += x * x
        if ROUTES:
            norm = tl.load(norm_ptr + col, mask=col < D, other=0.0)
            cell = (e < E)[:, None] & (col < D)[None, :]
            products += tl.load(gate_ptr + e[:, None] * D + col[None, :], mask=cell, other=0.0) * (x * norm)[None, :]
    factor = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    for start in tl.static_range(0, D, C):
        col = start + c
        if C < D:  # else x is still there
            x = tl.load(x_ptr + token * D + col, mask=col < D, other=0.0)
            if ADDS:
                x += tl.load(y_ptr + token * D + col, mask=col < D, other=0.0).to(tl.float32)
        h = x * factor * tl.load(norm_ptr + col, mask=col < D, other=0.0)
        tl.store(h_ptr + token * D + col, h.to(h_ptr.dtype.element_ty), mask=col < D)
    if ROUTES:
        logit = tl.where(e < E, tl.sum(products, 1) * factor, float("-inf"))
        p = tl.exp(logit - tl.max(logit, 0))
        left = tl.where(e < E, p / tl.sum(p, 0), -1.0)
        k = tl.arange(0, KS)
        weight, chosen = tl.zeros((KS,), dtype=tl.float32), tl.zeros((KS,), dtype=tl.int32)
        for n in tl.static_range(K):
            # NaN is no maximum: a row of NaN, which a broken request may bring, still chooses experts that exist.
            best = tl.minimum(tl.argmax(left, 0), E - 1)
            found = tl.sum(tl.where(e == best, left, 0.0), 0)
            weight, chosen = tl.where(k == n, found, weight), tl.where(k == n, best, chosen)
            left = tl.where(e == best, -2.0, left)
        tl.store(weight_ptr + token * K + k, weight / tl.sum(weight, 0), mask=k < K)
        tl.store(expert_ptr + token * K + k, chosen.to(expert_ptr.dtype.element_ty), mask=k < K)


def _launch(
    x_TD: Tensor,
    y_TD: Tensor | None,
    norm_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    gate_ED: Tensor | None,
    k: int,
    exchange: Exchange | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    D = x_TD.shape[-1]
    T, E = x_TD.numel() // D, 1 if gate_ED is None else len(gate_ED)
    x_TD = x_TD.contiguous()
    sum_TD = x_TD if y_TD is None else torch.empty_like(x_TD)
    h_TD = torch.empty(x_TD.shape, dtype=dtype, device=x_TD.device)
    weight_TK = torch.empty(T, k, dtype=torch.float32, device=x_TD.device)
    expert_TK = torch.empty(T, k, dtype=torch.int64, device=x_TD.device)
    experts = triton.next_power_of_2(E)
    # All of a token at once, if it fits the registers of 16 warps beside the router's products.
    columns = min(triton.next_power_of_2(D), 8192 if gate_ED is None else max(128, 32768 // experts))
    if exchange is not None:
        columns = triton.next_power_of_2(D)  # a row is exchanged at once
    turns, ranks = {"RANK": 0, "W": 1, "ROWS": 0}, (norm_D, norm_D)
    if exchange is not None:
        turns = {"RANK": exchange.rank, "W": exchange.size, "ROWS": exchange.rows}
        ranks = exchange.inbox_W, exchange.turn_T
    if T:
        _add_norm_kernel[(T,)](
            x_TD, x_TD if y_TD is None else y_TD.contiguous(), norm_D, norm_D if gate_ED is None else gate_ED,
            sum_TD, h_TD, weight_TK, expert_TK, *ranks, eps,
            D=D, C=columns, E=E, EXPERTS=experts, K=k, KS=triton.next_power_of_2(max(k, 1)),
            ADDS=y_TD is not None, ROUTES=gate_ED is not None, **turns, num_warps=8 if columns <= 2048 else 16,
            **overlap(x_TD, T),
        )  # fmt: skip
    return sum_TD, h_TD, weight_TK, expert_TK


@on_its_card
def add_rms_norm(
    x_TD: Tensor,
    y_TD: Tensor | None,
    norm_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.norm.add_rms_norm` in one launch."""
    return _launch(x_TD, y_TD, norm_D, eps, dtype, None, 1, exchange)[:2]


@on_its_card
def add_norm_route(
    x_TD: Tensor,
    y_TD: Tensor | None,
    norm_D: Tensor,
    eps: float,
    gate_ED: Tensor,
    k: int,
    dtype: torch.dtype,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.routing.add_norm_route` in one launch. exchange: as for `ops.norm.add_rms_norm`."""
    return _launch(x_TD, y_TD, norm_D, eps, dtype, gate_ED.contiguous(), k, exchange)
