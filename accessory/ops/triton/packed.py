"""Products with quantised weights for a few tokens, and their dequantisation for many, on a GPU.

With few tokens a product is bound by reading its weight once: bytes are unpacked in registers, and what a row or group
shares, its scale and zero point, is applied once to its sum. With many, a weight is dequantised into the 16 bits that
the tensor cores want.

Legend: T tokens, K experts a token, N = T·K pairs, E experts held here (numbers from `first`), D dim, F hidden dim, OUT
out and IN in features, G groups of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.ops.quantized import GROUP, ZERO_STEPS, Packed, nf4_table

CODES = {"int8": 0, "fp8": 1, "int4": 2, "nf4": 3}


@triton.jit
def _row_dot(
    x_ptr, data_ptr, scale_ptr, zero_ptr, table_ptr, rows, OUT: tl.constexpr, IN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """(ROWS,) fp32: rows of one weight (OUT, IN), which `data_ptr` and the others point to, times x (IN,)."""
    inside = rows < OUT
    if CODE < 2:
        acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
        for start in range(0, IN, COLS):
            cols = start + tl.arange(0, COLS)
            x = tl.load(x_ptr + cols, mask=cols < IN, other=0.0).to(tl.float32)[None, :]
            at = data_ptr + rows[:, None].to(tl.int64) * IN + cols[None, :]
            q = tl.load(at, mask=inside[:, None] & (cols[None, :] < IN), other=0.0)
            acc += q.to(tl.float32) * x
        dot = tl.sum(acc, 1) * tl.load(scale_ptr + rows, mask=inside, other=0.0)
    else:
        HALF: tl.constexpr = COLS // 2
        GROUPS: tl.constexpr = COLS // GROUP
        sums = tl.zeros((ROWS, GROUPS), dtype=tl.float32)
        for start in range(0, IN // 2, HALF):
            pair = start + tl.arange(0, HALF)
            even = tl.load(x_ptr + 2 * pair, mask=pair < IN // 2, other=0.0).to(tl.float32)
            odd = tl.load(x_ptr + 2 * pair + 1, mask=pair < IN // 2, other=0.0).to(tl.float32)
            at = data_ptr + rows[:, None].to(tl.int64) * (IN // 2) + pair[None, :]
            byte = tl.load(at, mask=inside[:, None] & (pair[None, :] < IN // 2), other=0)
            group = start // (GROUP // 2) + tl.arange(0, GROUPS)
            at_group = rows[:, None].to(tl.int64) * (IN // GROUP) + group[None, :]
            held = inside[:, None] & (group[None, :] < IN // GROUP)
            scale = tl.load(scale_ptr + at_group, mask=held, other=0.0).to(tl.float32)
            if CODE == 2:
                part = (byte >> 4).to(tl.float32) * even[None, :] + (byte & 15).to(tl.float32) * odd[None, :]
                by_group = tl.sum(tl.reshape(part, (ROWS, GROUPS, GROUP // 2)), 2)
                x_sum = tl.sum(tl.reshape(even + odd, (GROUPS, GROUP // 2)), 1)
                zero = tl.load(zero_ptr + at_group, mask=held, other=0).to(tl.float32) * (1.0 / STEPS)
                sums += scale * (by_group - zero * x_sum[None, :])
            else:
                high = tl.load(table_ptr + (byte >> 4).to(tl.int32))
                low = tl.load(table_ptr + (byte & 15).to(tl.int32))
                part = high * even[None, :] + low * odd[None, :]
                sums += scale * tl.sum(tl.reshape(part, (ROWS, GROUPS, GROUP // 2)), 2)
        dot = tl.sum(sums, 1)
    return dot


@triton.jit
def _linear_kernel(
    x_ptr, data_ptr, scale_ptr, zero_ptr, table_ptr, y_ptr, OUT: tl.constexpr, IN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """y_TO = x_TI Wᵀ, ROWS outputs of one token."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    x_ptr += token * IN
    y = _row_dot(x_ptr, data_ptr, scale_ptr, zero_ptr, table_ptr, rows, OUT, IN, ROWS, COLS, CODE, GROUP, STEPS)
    tl.store(y_ptr + token * OUT + rows, y.to(y_ptr.dtype.element_ty), mask=rows < OUT)


@triton.jit
def _up_kernel(
    x_ptr, d1_ptr, s1_ptr, z1_ptr, d3_ptr, s3_ptr, z3_ptr, table_ptr, expert_ptr, h_ptr,
    first, experts, data_e, scale_e,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """h_NF = silu(w1 x) ⊙ (w3 x) for ROWS hidden units of one pair; pairs with experts held elsewhere write nothing."""
    pair = tl.program_id(1)
    e = tl.load(expert_ptr + pair) - first
    if (e >= 0) & (e < experts):
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        x_ptr += (pair // K) * D
        at, at_scale = e.to(tl.int64) * data_e, e.to(tl.int64) * scale_e
        gate = _row_dot(
            x_ptr, d1_ptr + at, s1_ptr + at_scale, z1_ptr + at_scale, table_ptr, rows,
            F, D, ROWS, COLS, CODE, GROUP, STEPS,
        )  # fmt: skip
        up = _row_dot(
            x_ptr, d3_ptr + at, s3_ptr + at_scale, z3_ptr + at_scale, table_ptr, rows,
            F, D, ROWS, COLS, CODE, GROUP, STEPS,
        )  # fmt: skip
        h = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(h_ptr + pair * F + rows, h.to(h_ptr.dtype.element_ty), mask=rows < F)


@triton.jit
def _down_kernel(
    h_ptr, d2_ptr, s2_ptr, z2_ptr, table_ptr, expert_ptr, weight_ptr, y_ptr, first, experts, data_e, scale_e,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """y_TD = Σ_k weight · (w2 h) for ROWS outputs of one token, always in the order of k."""
    token = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y = tl.zeros((ROWS,), dtype=tl.float32)
    for k in tl.static_range(K):
        pair = token * K + k
        e = tl.load(expert_ptr + pair) - first
        if (e >= 0) & (e < experts):
            at, at_scale = e.to(tl.int64) * data_e, e.to(tl.int64) * scale_e
            part = _row_dot(
                h_ptr + pair * F, d2_ptr + at, s2_ptr + at_scale, z2_ptr + at_scale, table_ptr, rows,
                D, F, ROWS, COLS, CODE, GROUP, STEPS,
            )  # fmt: skip
            y += tl.load(weight_ptr + pair) * part
    tl.store(y_ptr + token * D + rows, y, mask=rows < D)


@triton.jit
def _dequantize_kernel(
    data_ptr, scale_ptr, zero_ptr, table_ptr, out_ptr, n_bytes, IN: tl.constexpr,
    BLOCK: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Every number of a weight or stack, in fp32 and rounded once; BLOCK bytes a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n_bytes
    kind = out_ptr.dtype.element_ty
    if CODE < 2:
        q = tl.load(data_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + at // IN, mask=mask, other=0.0)
        tl.store(out_ptr + at, (q * scale).to(kind), mask=mask)
    else:
        byte = tl.load(data_ptr + at, mask=mask, other=0)
        group = at // (GROUP // 2)
        scale = tl.load(scale_ptr + group, mask=mask, other=0.0).to(tl.float32)
        if CODE == 2:
            zero = tl.load(zero_ptr + group, mask=mask, other=0).to(tl.float32) * (1.0 / STEPS)
            high, low = (byte >> 4).to(tl.float32) - zero, (byte & 15).to(tl.float32) - zero
        else:
            high = tl.load(table_ptr + (byte >> 4).to(tl.int32))
            low = tl.load(table_ptr + (byte & 15).to(tl.int32))
        both = tl.interleave((high * scale).to(kind), (low * scale).to(kind))
        out = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
        tl.store(out_ptr + out, both, mask=out < 2 * n_bytes)


def _pointers(p: Packed) -> tuple[Tensor, Tensor, Tensor]:
    return p.data, p.scale, p.scale if p.zero is None else p.zero


def _constants(p: Packed) -> dict[str, Any]:
    return {"CODE": CODES[p.format], "GROUP": GROUP.get(p.format, 0), "STEPS": ZERO_STEPS}


def dequantize(p: Packed, dtype: torch.dtype) -> Tensor:
    """`ops.quantized.dequantize`, one pass over memory."""
    out = torch.empty(p.shape, dtype=dtype, device=p.data.device)
    n, block = p.data.numel(), 1024
    _dequantize_kernel[(triton.cdiv(n, block),)](
        *_pointers(p), nf4_table(p.data.device), out, n, IN=p.shape[-1], BLOCK=block, **_constants(p)
    )
    return out


# (rows, columns, warps) of a program, by format and kernel: the best of 24 on an H100 at Mixtral-8x7B's sizes, in µs
# (floor): int8 92, 59, 13 (78, 39, 6); fp8 90, 59, 13 (the same); int4 89, 57, 14 (41, 21, 3), bound by arithmetic;
# nf4 219, 122, 22 (44, 22, 3), bound by looking up its table.
TILES = {
    "int8": {"up": (4, 2048, 4), "down": (1, 1024, 4), "linear": (1, 1024, 4)},
    "fp8": {"up": (2, 2048, 4), "down": (1, 1024, 4), "linear": (2, 4096, 4)},
    "int4": {"up": (4, 4096, 4), "down": (8, 2048, 4), "linear": (4, 4096, 4)},
    "nf4": {"up": (1, 4096, 4), "down": (1, 2048, 4), "linear": (1, 4096, 4)},
}


def _tile(p: Packed, kernel: str, columns: int) -> dict[str, int]:
    rows, cols, warps = TILES[p.format][kernel]
    least = GROUP.get(p.format, 16)
    return {"ROWS": rows, "COLS": max(least, min(cols, triton.next_power_of_2(columns))), "num_warps": warps}


def linear(x_TI: Tensor, p: Packed) -> Tensor:
    """x (T, IN) times a quantised weight, (T, OUT) in x's dtype; meant for few tokens: each reads the weight anew."""
    (T, IN), OUT = x_TI.shape, p.shape[0]
    x_TI = x_TI.contiguous()
    y_TO = torch.empty(T, OUT, dtype=x_TI.dtype, device=x_TI.device)
    tile = _tile(p, "linear", IN)
    _linear_kernel[(triton.cdiv(OUT, tile["ROWS"]), T)](
        x_TI, *_pointers(p), nf4_table(x_TI.device), y_TO, OUT=OUT, IN=IN, **tile, **_constants(p)
    )
    return y_TO


def swiglu_pairs(
    x_TD: Tensor, w1: Packed, w2: Packed, w3: Packed, weight_TK: Tensor, expert_TK: Tensor, first: int = 0
) -> Tensor:
    """`ops.triton.pairs.swiglu_pairs` with quantised stacks of one format: (T, D) fp32."""
    (T, D), (E, F, _), K = x_TD.shape, w1.shape, expert_TK.shape[1]
    h_NF = torch.empty(T * K, F, dtype=x_TD.dtype, device=x_TD.device)
    y_TD = torch.empty(T, D, dtype=torch.float32, device=x_TD.device)
    x_TD, weight_TK, expert_TK = x_TD.contiguous(), weight_TK.contiguous(), expert_TK.contiguous()
    table = nf4_table(x_TD.device)
    up, down = _tile(w1, "up", D), _tile(w2, "down", F)
    _up_kernel[(triton.cdiv(F, up["ROWS"]), T * K)](
        x_TD, *_pointers(w1), *_pointers(w3), table, expert_TK, h_NF, first, E, w1.data[0].numel(), w1.scale[0].numel(),
        D=D, F=F, K=K, **up, **_constants(w1),
    )  # fmt: skip
    _down_kernel[(triton.cdiv(D, down["ROWS"]), T)](
        h_NF, *_pointers(w2), table, expert_TK, weight_TK, y_TD, first, E, w2.data[0].numel(), w2.scale[0].numel(),
        D=D, F=F, K=K, **down, **_constants(w2),
    )  # fmt: skip
    return y_TD
