"""Products of many rows with quantised weights. A weight is dequantised tile by tile, just before the tensor cores.

Rows are sorted by expert. A program multiplies a tile of one expert's rows by a tile of that expert's weight. It finds
its tiles from the experts' counts on the device, so nothing waits for the host and a CUDA graph can record the product.
Weights become 16 bits as in `dequantize` (nf4's values as in `nibbles`); sums are in fp32.

Legend: N rows sorted by expert, E experts, OUT out and IN in features, G groups of a row. A tile of x has M rows. A
tile of the weight has P numbers along the dimension that the product keeps, and R along the one that it sums over.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.ops.quantized import Packed
from accessory.ops.triton.card import measured_on, on_its_card
from accessory.ops.triton.grouped import grid, place, slots
from accessory.ops.triton.nibbles import finished, held_words, int4_bias, int4_values, nested_scale, nf4_values
from accessory.ops.triton.packed import constants, pointers


@triton.jit
def _scales(
    scale_ptr, zero_ptr, offset_ptr, table_ptr, row, group, IN: tl.constexpr,
    CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr, NESTED: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """(factor, subtrahend) of rows (A,) and groups (B,) of a weight: both fp32 (A, B). Only int4 needs the second."""
    G: tl.constexpr = IN // GROUP
    group = tl.minimum(group, G - 1)
    if CODE == 4:
        held = row[:, None] >= 0
        scale = nested_scale(scale_ptr, zero_ptr, offset_ptr, table_ptr, row[:, None], group[None, :], held, G, NESTED)
        return scale, scale
    at = row[:, None] * G + group[None, :]
    scale = tl.load(scale_ptr + at).to(tl.float32)
    if CODE == 2:
        zero = tl.load(zero_ptr + at).to(tl.float32) * (1.0 / STEPS)
        return scale, (zero + int4_bias(PERMUTE)) * scale
    else:
        return scale, scale


@triton.jit
def _values(
    data, words, scale, less, table_ptr, A: tl.constexpr, B: tl.constexpr,
    CODE: tl.constexpr, GROUP: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """A tile of a weight, (A, B) fp32, from its loaded bytes and the `_scales` of its groups."""
    if CODE < 2:
        return data.to(tl.float32) * scale
    else:
        if CODE == 2:
            high, low = int4_values(data, PERMUTE)
        else:
            high, low = nf4_values(data, words, table_ptr, PERMUTE)
        if B > GROUP:
            high = tl.reshape(high, (A, B // GROUP, GROUP // 2))
            low = tl.reshape(low, (A, B // GROUP, GROUP // 2))
            scale, less = scale[:, :, None], less[:, :, None]
        if CODE == 2:  # rounds once, as (q - zero) · scale does, because both products are exact
            high, low = tl.fma(high, scale, -less), tl.fma(low, scale, -less)
        else:
            high, low = high * scale, low * scale
        if B > GROUP:
            high, low = tl.reshape(high, (A, B // 2)), tl.reshape(low, (A, B // 2))
        return tl.interleave(high, low)


@triton.jit(do_not_specialize=["N"])  # see `grouped._product_kernel`
def _forward_kernel(
    x_ptr, data_ptr, scale_ptr, zero_ptr, offset_ptr, table_ptr, count_ptr, y_ptr, N,
    OUT: tl.constexpr, IN: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr, COUNTED: tl.constexpr,
    M: tl.constexpr, P: tl.constexpr, R: tl.constexpr, SIDE: tl.constexpr, SWAP: tl.constexpr,
    CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr, NESTED: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """y_NO = x_NI Wᵀ of each row's expert."""
    block, e, first, end = place(count_ptr, N, OUT, E, SLOTS, COUNTED, M, P, SIDE)
    if e < E:
        out = block * P + tl.arange(0, P)
        row = first + tl.arange(0, M)
        out_held, row_held = tl.minimum(out, OUT - 1), tl.minimum(row, N - 1)
        R_BYTES: tl.constexpr = R if CODE < 2 else R // 2
        IN_BYTES: tl.constexpr = IN if CODE < 2 else IN // 2
        weight = e.to(tl.int64) * OUT if E > 1 else 0
        data_ptr += weight * IN_BYTES
        byte = tl.arange(0, R_BYTES)
        col = tl.arange(0, R)
        at_data = data_ptr + out_held[:, None].to(tl.int64) * IN_BYTES + byte[None, :]
        at_x = x_ptr + row_held[:, None].to(tl.int64) * IN + col[None, :]
        if CODE < 2:
            scale = tl.load(scale_ptr + weight + out_held)[:, None]
            less = scale
        else:
            G: tl.constexpr = IN // GROUP
            scale_ptr += weight * G
            zero_ptr += weight * G // NESTED
            offset_ptr += weight
            groups = tl.arange(0, R // GROUP if R > GROUP else 1)
            scale, less = _scales(
                scale_ptr, zero_ptr, offset_ptr, table_ptr, out_held, groups, IN, CODE, GROUP, STEPS, NESTED, PERMUTE
            )
        acc = tl.zeros((P, M) if SWAP else (M, P), dtype=tl.float32)
        words = held_words(table_ptr, tl.float16, CODE, PERMUTE)
        for start in range(0, IN, R):
            if IN % R == 0:
                data, x = tl.load(at_data), tl.load(at_x)
            else:
                left = IN - start
                data = tl.load(at_data, mask=byte[None, :] < (left if CODE < 2 else left // 2), other=0.0)
                x = tl.load(at_x, mask=col[None, :] < left, other=0.0)
            w = _values(data, words, scale, less, table_ptr, P, R, CODE, GROUP, PERMUTE).to(x.dtype)
            if CODE >= 2:  # load the scales of the next turn while this turn multiplies
                group = (start + R) // GROUP + groups
                scale, less = _scales(
                    scale_ptr, zero_ptr, offset_ptr, table_ptr, out_held, group, IN, CODE, GROUP, STEPS, NESTED, PERMUTE
                )
            if SWAP:
                acc = finished(tl.dot(w, tl.trans(x), acc, input_precision="ieee"), PERMUTE)
            else:
                acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
            at_data += R_BYTES
            at_x += R
        y = tl.trans(acc) if SWAP else acc
        at_y = y_ptr + row[:, None].to(tl.int64) * OUT + out[None, :]
        tl.store(at_y, y.to(y_ptr.dtype.element_ty), mask=(row[:, None] < end) & (out[None, :] < OUT))


@triton.jit
def _backward_kernel(
    dy_ptr, data_ptr, scale_ptr, zero_ptr, offset_ptr, table_ptr, count_ptr, dx_ptr, N,
    OUT: tl.constexpr, IN: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr, COUNTED: tl.constexpr,
    M: tl.constexpr, P: tl.constexpr, R: tl.constexpr, SIDE: tl.constexpr,
    CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr, NESTED: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """dx_NI = dy_NO W of each row's expert."""
    block, e, first, end = place(count_ptr, N, IN, E, SLOTS, COUNTED, M, P, SIDE)
    if e < E:
        col = block * P + tl.arange(0, P)
        row = first + tl.arange(0, M)
        row_held = tl.minimum(row, N - 1)
        P_BYTES: tl.constexpr = P if CODE < 2 else P // 2
        IN_BYTES: tl.constexpr = IN if CODE < 2 else IN // 2
        weight = e.to(tl.int64) * OUT if E > 1 else 0
        byte = block * P_BYTES + tl.arange(0, P_BYTES)
        out = tl.arange(0, R)
        at_dy = dy_ptr + row_held[:, None].to(tl.int64) * OUT + out[None, :]
        if CODE < 2:
            scale_ptr += weight
        else:
            G: tl.constexpr = IN // GROUP
            scale_ptr += weight * G
            zero_ptr += weight * G // NESTED
            offset_ptr += weight
            groups = block * P // GROUP + tl.arange(0, P // GROUP if P > GROUP else 1)
        acc = tl.zeros((M, P), dtype=tl.float32)
        words = held_words(table_ptr, tl.float16, CODE, PERMUTE)
        for start in range(0, OUT, R):
            out_held = start + out if OUT % R == 0 else tl.minimum(start + out, OUT - 1)
            at_data = data_ptr + (weight + out_held[:, None].to(tl.int64)) * IN_BYTES + byte[None, :]
            # Without a mask where none is needed: even a mask that is always true would prevent wide loads.
            within_row = None if IN % P == 0 else byte[None, :] < IN_BYTES
            data = tl.load(at_data, mask=within_row, other=None if IN % P == 0 else 0.0)
            summed = None if OUT % R == 0 else (start + out < OUT)[None, :]
            dy = tl.load(at_dy, mask=summed, other=None if OUT % R == 0 else 0.0)
            if CODE < 2:
                scale = tl.load(scale_ptr + out_held)[:, None]
                less = scale
            else:
                scale, less = _scales(
                    scale_ptr, zero_ptr, offset_ptr, table_ptr, out_held, groups,
                    IN, CODE, GROUP, STEPS, NESTED, PERMUTE,
                )  # fmt: skip
            w = _values(data, words, scale, less, table_ptr, R, P, CODE, GROUP, PERMUTE).to(dy.dtype)
            acc = tl.dot(dy, w, acc, input_precision="ieee")
            at_dy += R
        at_dx = dx_ptr + row[:, None].to(tl.int64) * IN + col[None, :]
        tl.store(at_dx, acc.to(dx_ptr.dtype.element_ty), mask=(row[:, None] < end) & (col[None, :] < IN))


def _launch(kernel: Any, a_NR: Tensor, p: Packed, count_E: Tensor | None, keeps: int, tile: dict[str, Any]) -> Tensor:
    """a (N, R) times each row's expert's weight: (N, `keeps`) in a's dtype."""
    a_NR = a_NR.contiguous()
    N, (*stack, OUT, IN) = a_NR.shape[0], p.shape
    E = stack[0] if stack else 1
    out_NP = torch.empty(N, keeps, dtype=a_NR.dtype, device=a_NR.device)
    if N == 0:
        return out_NP
    kernel[grid(N, E, keeps, tile)](
        a_NR, *pointers(p), a_NR if count_E is None else count_E, out_NP, N,
        OUT=OUT, IN=IN, E=E, SLOTS=slots(E), COUNTED=count_E is not None, **tile, **constants(p),
    )  # fmt: skip
    return out_NP


# Tile sizes by the most rows an expert: (M, P, R, SIDE, SWAP, warps, stages) forward, (M, P, R, SIDE, warps, stages)
# backward. ALONE is for a single weight, which has fewer tiles to keep a card busy. Each is the best of about five on
# an H100 at Mixtral-8x7B's sizes, over int4, nf4 and int8 together; benchmarks/README.md has the times.
FORWARD = {
    12: (16, 64, 128, 1, True, 4, 4),
    48: (64, 64, 64, 1, False, 4, 4),
    192: (128, 128, 64, 4, False, 8, 3),
    2**62: (128, 128, 64, 8, False, 8, 3),
}
ALONE = {32: (16, 32, 128, 1, False, 4, 4), 2**62: (64, 32, 128, 1, False, 4, 3)}
BACKWARD = {32: (64, 128, 64, 8, 4, 3), 2**62: (128, 128, 64, 8, 8, 3)}


def _tile(table: dict[int, tuple[Any, ...]], rows: float) -> dict[str, Any]:
    *sizes, warps, stages = next(tile for most, tile in table.items() if rows <= most)
    return {**dict(zip(("M", "P", "R", "SIDE", "SWAP"), sizes, strict=False)), "num_warps": warps, "num_stages": stages}


@on_its_card
def product(
    x_NI: Tensor,
    p: Packed,
    count_E: Tensor | None = None,
    as_rows: float | None = None,
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """x (N, I) times a quantised stack (E, O, I), with rows sorted by expert, or times one weight (O, I).

    Returns (N, O) in x's dtype. as_rows: take the tile for so many rows an expert, by default for as many as there are.
    """
    rows = len(x_NI) / (1 if count_E is None else len(count_E)) if as_rows is None else as_rows
    O, I = p.shape[-2], p.shape[-1]  # noqa: E741
    if tile is None and count_E is not None:
        tile = measured_on(x_NI.device, "packed_grouped", p.format, O, I, rows)
    tile = tile or _tile(ALONE if count_E is None else FORWARD, rows)
    return _launch(_forward_kernel, x_NI, p, count_E, p.shape[-2], tile)


@on_its_card
def gradient(dy_NO: Tensor, p: Packed, count_E: Tensor | None = None) -> Tensor:
    """The gradient of `product`'s input: dy (N, O) times the stack (E, O, I), or the weight (O, I), not transposed.

    Returns (N, I) in dy's dtype.
    """
    rows = len(dy_NO) / (1 if count_E is None else len(count_E))
    return _launch(_backward_kernel, dy_NO, p, count_E, p.shape[-1], _tile(BACKWARD, rows))
