"""Products with quantised weights for a few tokens on a GPU, and dequantisation for many tokens.

With few tokens a product's time is that of reading its weight once. Bytes are unpacked in registers. The scale and zero
point of a row or group are applied once, to its sum. With many tokens a weight is dequantised to 16 bits for the tensor
cores.

Legend: T tokens, K experts a token, N = T·K pairs, E experts of this rank (numbers from `first`), D dim, F hidden dim,
OUT out and IN in features, G groups of a row.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.formats import GROUP
from accessory.ops import double_quantization
from accessory.ops.linear import Weight
from accessory.ops.quantized import ZERO_STEPS, Packed, nf4_table
from accessory.ops.triton.card import cdiv, on_its_card
from accessory.ops.triton.low_rank import adapter_number, beside, down_terms, up_terms
from accessory.ops.triton.nibbles import (
    held_words,
    int4_bias,
    int4_values,
    literals,
    nested_scale,
    nf4_values,
    permutes,
)
from accessory.ops.triton.overlap import let_next_begin, overlap, wait_for_inputs

CODES = {"int8": 0, "fp8": 1, "int4": 2, "nf4": 3, "nf4-dq": 4}


# A thread sums this many numbers (16 bytes) before it applies a scale. No group is shorter.
CHUNK = tl.constexpr(32)


@triton.jit
def _input_pairs(x_ptr, pair, mask):
    """(even, odd), fp32: the numbers 2·pair and 2·pair + 1 of x. Two 16-bit numbers are loaded as one word."""
    if x_ptr.dtype.element_ty.primitive_bitwidth == 16:
        word = tl.load(x_ptr.to(tl.pointer_type(tl.uint32)) + pair, mask=mask, other=0)
        if x_ptr.dtype.element_ty == tl.bfloat16:  # bf16 is the upper half of an fp32 number
            return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            even = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
            return even.to(tl.float32), (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        even = tl.load(x_ptr + 2 * pair, mask=mask, other=0.0).to(tl.float32)
        return even, tl.load(x_ptr + 2 * pair + 1, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row_dot(
    x_ptr, data_ptr, scale_ptr, zero_ptr, offset_ptr, table_ptr, rows, OUT: tl.constexpr, IN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
    NESTED: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """(ROWS,) fp32: rows of one weight (OUT, IN) times x (IN,). The pointers point to the tensors of that weight."""
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
        CHUNKS: tl.constexpr = COLS // CHUNK
        sums = tl.zeros((ROWS, CHUNKS), dtype=tl.float32)
        words = held_words(table_ptr, tl.float16, CODE, PERMUTE)
        for start in range(0, IN // 2, HALF):
            pair = start + tl.arange(0, HALF)
            even, odd = _input_pairs(x_ptr, pair, pair < IN // 2)
            at = data_ptr + rows[:, None].to(tl.int64) * (IN // 2) + pair[None, :]
            byte = tl.load(at, mask=inside[:, None] & (pair[None, :] < IN // 2), other=0)
            group = (start * 2) // GROUP + tl.arange(0, CHUNKS) // (GROUP // CHUNK)
            at_group = rows[:, None].to(tl.int64) * (IN // GROUP) + group[None, :]
            held = inside[:, None] & (group[None, :] < IN // GROUP)
            if CODE == 4:
                scale = nested_scale(
                    scale_ptr, zero_ptr, offset_ptr, table_ptr, rows[:, None], group[None, :], held, IN // GROUP, NESTED
                )
            else:
                scale = tl.load(scale_ptr + at_group, mask=held, other=0.0).to(tl.float32)
            if CODE == 2:
                high, low = int4_values(byte, PERMUTE)
            else:
                high, low = nf4_values(byte, words, table_ptr, PERMUTE)
            part = high * even[None, :] + low * odd[None, :]
            by_chunk = tl.sum(tl.reshape(part, (ROWS, CHUNKS, CHUNK // 2)), 2)
            if CODE == 2:
                x_sum = tl.sum(tl.reshape(even + odd, (CHUNKS, CHUNK // 2)), 1)
                zero = tl.load(zero_ptr + at_group, mask=held, other=0).to(tl.float32) * (1.0 / STEPS)
                by_chunk -= (zero + int4_bias(PERMUTE)) * x_sum[None, :]
            sums += scale * by_chunk
        dot = tl.sum(sums, 1)
    return dot


@triton.jit
def _linear_kernel(
    x_ptr, data_ptr, scale_ptr, zero_ptr, offset_ptr, table_ptr, y_ptr, OUT: tl.constexpr, IN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
    NESTED: tl.constexpr, PERMUTE: tl.constexpr, OVERLAPS: tl.constexpr = False,
):  # fmt: skip
    """y_TO = x_TI Wᵀ, ROWS outputs of one token."""
    wait_for_inputs(OVERLAPS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    x_ptr += token * IN
    y = _row_dot(
        x_ptr, data_ptr, scale_ptr, zero_ptr, offset_ptr, table_ptr, rows,
        OUT, IN, ROWS, COLS, CODE, GROUP, STEPS, NESTED, PERMUTE,
    )  # fmt: skip
    let_next_begin(OVERLAPS)
    tl.store(y_ptr + token * OUT + rows, y.to(y_ptr.dtype.element_ty), mask=rows < OUT)


@triton.jit
def _up_kernel(
    x_ptr, d1_ptr, s1_ptr, z1_ptr, o1_ptr, d3_ptr, s3_ptr, z3_ptr, o3_ptr, table_ptr,
    low_ptr, b1_ptr, bias1_ptr, b3_ptr, bias3_ptr, adapter_ptr, expert_ptr, h_ptr, first, experts, data_e, scale_e,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, R1: tl.constexpr, R3: tl.constexpr,
    BIAS1: tl.constexpr, BIAS3: tl.constexpr, SLOTS: tl.constexpr, STACKED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
    NESTED: tl.constexpr, PERMUTE: tl.constexpr, OVERLAPS: tl.constexpr = False,
):  # fmt: skip
    """h_NF = silu(w1 x) ⊙ (w3 x) for ROWS hidden units of one pair. Pairs with another rank's expert write nothing."""
    wait_for_inputs(OVERLAPS)
    pair = tl.program_id(1)
    e = tl.load(expert_ptr + pair) - first
    if (e >= 0) & (e < experts):
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        x_ptr += (pair // K) * D
        at, at_scale = e.to(tl.int64) * data_e, e.to(tl.int64) * scale_e
        at_zero = at_scale // NESTED
        gate = _row_dot(
            x_ptr, d1_ptr + at, s1_ptr + at_scale, z1_ptr + at_zero, o1_ptr + e * F, table_ptr, rows,
            F, D, ROWS, COLS, CODE, GROUP, STEPS, NESTED, PERMUTE,
        )  # fmt: skip
        up = _row_dot(
            x_ptr, d3_ptr + at, s3_ptr + at_scale, z3_ptr + at_zero, o3_ptr + e * F, table_ptr, rows,
            F, D, ROWS, COLS, CODE, GROUP, STEPS, NESTED, PERMUTE,
        )  # fmt: skip
        let_next_begin(OVERLAPS)
        number = adapter_number(adapter_ptr, pair // K, e, experts, STACKED)
        low_ptr += pair * (R1 + R3)
        gate += beside(low_ptr, b1_ptr, bias1_ptr, rows, e, number, F, R1, SLOTS, BIAS1)
        up += beside(low_ptr + R1, b3_ptr, bias3_ptr, rows, e, number, F, R3, SLOTS, BIAS3)
        h = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(h_ptr + pair * F + rows, h.to(h_ptr.dtype.element_ty), mask=rows < F)


@triton.jit
def _down_kernel(
    h_ptr, d2_ptr, s2_ptr, z2_ptr, o2_ptr, table_ptr, low_ptr, b_ptr, bias_ptr, adapter_ptr, expert_ptr, weight_ptr,
    y_ptr, first, experts, data_e, scale_e, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, BIAS: tl.constexpr, SLOTS: tl.constexpr, STACKED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
    NESTED: tl.constexpr, PERMUTE: tl.constexpr, OVERLAPS: tl.constexpr = False,
):  # fmt: skip
    """y_TD = Σ_k weight · (w2 h) for ROWS outputs of one token, always in the order of k."""
    wait_for_inputs(OVERLAPS)
    token = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y = tl.zeros((ROWS,), dtype=tl.float32)
    for k in tl.static_range(K):
        pair = token * K + k
        e = tl.load(expert_ptr + pair) - first
        if (e >= 0) & (e < experts):
            at, at_scale = e.to(tl.int64) * data_e, e.to(tl.int64) * scale_e
            at_zero = at_scale // NESTED
            part = _row_dot(
                h_ptr + pair * F, d2_ptr + at, s2_ptr + at_scale, z2_ptr + at_zero, o2_ptr + e * D, table_ptr, rows,
                D, F, ROWS, COLS, CODE, GROUP, STEPS, NESTED, PERMUTE,
            )  # fmt: skip
            number = adapter_number(adapter_ptr, token, e, experts, STACKED)
            part += beside(low_ptr + pair * R, b_ptr, bias_ptr, rows, e, number, D, R, SLOTS, BIAS)
            y += tl.load(weight_ptr + pair) * part
    let_next_begin(OVERLAPS)
    tl.store(y_ptr + token * D + rows, y, mask=rows < D)


@triton.jit
def _dequantize_kernel(
    data_ptr, scale_ptr, zero_ptr, offset_ptr, table_ptr, out_ptr, n_bytes, IN: tl.constexpr,
    BLOCK: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
    NESTED: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """Every number of a weight or stack, computed in fp32 and rounded once. A program handles BLOCK bytes."""
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
        if CODE == 4:
            row = group // (IN // GROUP)
            scale = nested_scale(
                scale_ptr, zero_ptr, offset_ptr, table_ptr, row, group % (IN // GROUP), mask, IN // GROUP, NESTED
            )
        else:
            scale = tl.load(scale_ptr + group, mask=mask, other=0.0).to(tl.float32)
        if CODE == 2:
            zero = tl.load(zero_ptr + group, mask=mask, other=0).to(tl.float32) * (1.0 / STEPS)
            high, low = (byte >> 4).to(tl.float32) - zero, (byte & 15).to(tl.float32) - zero
        else:
            high, low = nf4_values(byte, (), table_ptr, False)  # the exact table: memory bounds this pass anyway
        both = tl.interleave((high * scale).to(kind), (low * scale).to(kind))
        out = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
        tl.store(out_ptr + out, both, mask=out < 2 * n_bytes)


def pointers(p: Packed) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A weight's tensors for the kernels: data, scale, zero points or nested scales, offset, and nf4's tables.

    The scale stands in for a tensor that the format does not have.
    """
    zero, offset = p.nested if p.zero is None else p.zero, p.offset
    zero, offset = p.scale if zero is None else zero, p.scale if offset is None else offset
    return p.data, p.scale, zero, offset, _tables(p.data.device)


@cache
def _tables(device: torch.device) -> Tensor:
    bits = torch.tensor(literals(), device=device).to(torch.int32).repeat_interleave(32).view(torch.float32)
    return torch.cat([nf4_table(device), double_quantization.values(device), bits])


def constants(p: Packed) -> dict[str, Any]:
    fixed = {"CODE": CODES[p.format], "GROUP": GROUP.get(p.format, 0), "STEPS": ZERO_STEPS, "PERMUTE": permutes()}
    return {**fixed, "NESTED": 1 if p.nested is None else p.scale.shape[-1] // p.nested.shape[-1]}


@on_its_card
def dequantize(p: Packed, dtype: torch.dtype) -> Tensor:
    """`ops.quantized.dequantize` in one pass over memory: (…, O, I) in `dtype`."""
    out = torch.empty(p.shape, dtype=dtype, device=p.data.device)
    n, block = p.data.numel(), 1024
    _dequantize_kernel[(cdiv(n, block),)](*pointers(p), out, n, IN=p.shape[-1], BLOCK=block, **constants(p))
    return out


# (rows, columns, warps) of a program, by format and kernel: the best of 24 on an H100 at Mixtral-8x7B's sizes. µs of
# up, down, linear, with the time of reading the weight once in brackets: int8 92, 59, 9 (78, 39, 6); fp8 90, 59, 9 (the
# same); int4 64, 45, 7 (41, 21, 3); nf4 87, 54, 9 (44, 22, 3).
TILES = {
    "int8": {"up": (4, 2048, 4), "down": (1, 1024, 4), "linear": (1, 1024, 4)},
    "fp8": {"up": (2, 2048, 4), "down": (1, 1024, 4), "linear": (2, 4096, 4)},
    "int4": {"up": (8, 2048, 2), "down": (8, 2048, 2), "linear": (8, 2048, 4)},
    "nf4": {"up": (4, 2048, 4), "down": (4, 1024, 2), "linear": (4, 1024, 2)},
}


def _tile(p: Packed, kernel: str, columns: int) -> dict[str, int]:
    rows, cols, warps = TILES[p.format.removesuffix("-dq")][kernel]
    least = GROUP.get(p.format, 16)
    return {"ROWS": rows, "COLS": max(least, min(cols, triton.next_power_of_2(columns))), "num_warps": warps}


@on_its_card
def linear(x_TI: Tensor, p: Packed) -> Tensor:
    """x (T, IN) times a quantised weight: (T, OUT) in x's dtype. For few tokens: each token reads the weight again."""
    (T, IN), OUT = x_TI.shape, p.shape[0]
    x_TI = x_TI.contiguous()
    y_TO = torch.empty(T, OUT, dtype=x_TI.dtype, device=x_TI.device)
    tile = _tile(p, "linear", IN)
    _linear_kernel[(cdiv(OUT, tile["ROWS"]), T)](
        x_TI, *pointers(p), y_TO, OUT=OUT, IN=IN, **tile, **constants(p), **overlap(x_TI)
    )
    return y_TO


@on_its_card
def decode_experts(
    x_TD: Tensor,
    w1_EFD: Weight,
    w2_EDF: Weight,
    w3_EFD: Weight,
    weight_TK: Tensor,
    expert_TK: Tensor,
    first: int = 0,
    adapter_T: Tensor | None = None,
) -> Tensor:
    """`ops.triton.decode_experts.decode_experts` with quantised stacks of one format: (T, D) fp32."""
    w1, w2, w3 = (cast(Packed, w.weight) for w in (w1_EFD, w2_EDF, w3_EFD))
    (T, D), (E, F, _), K = x_TD.shape, w1.shape, expert_TK.shape[1]
    h_NF = torch.empty(T * K, F, dtype=x_TD.dtype, device=x_TD.device)
    y_TD = torch.empty(T, D, dtype=torch.float32, device=x_TD.device)
    x_TD, weight_TK, expert_TK = x_TD.contiguous(), weight_TK.contiguous(), expert_TK.contiguous()
    up, down = _tile(w1, "up", D), _tile(w2, "down", F)
    terms, beside_them = up_terms(x_TD, w1_EFD, w3_EFD, expert_TK, first, adapter_T)
    _up_kernel[(cdiv(F, up["ROWS"]), T * K)](
        x_TD, *pointers(w1)[:4], *pointers(w3), *terms, expert_TK, h_NF, first, E,
        w1.data[0].numel(), w1.scale[0].numel(), D=D, F=F, K=K, **beside_them, **up, **constants(w1),
        **overlap(x_TD),
    )  # fmt: skip
    terms, beside_them = down_terms(h_NF, w2_EDF, expert_TK, first, adapter_T)
    _down_kernel[(cdiv(D, down["ROWS"]), T)](
        h_NF, *pointers(w2), *terms, expert_TK, weight_TK, y_TD, first, E,
        w2.data[0].numel(), w2.scale[0].numel(), D=D, F=F, K=K, **beside_them, **down, **constants(w2),
        **overlap(x_TD),
    )  # fmt: skip
    return y_TD
