"""Products of rows with dense stacks of weights, in bf16, fp16 or fp32, without the host.

Rows are sorted by expert. A program multiplies a tile of one expert's rows by a tile of that expert's weight. It finds
its tiles from the experts' counts on the device, so nothing waits for the host and a CUDA graph can record the product.
The grid depends on the number of rows and of experts only; programs without a tile end at once. Sums are in fp32.

Legend: N rows sorted by expert, E experts, OUT out and IN in features. A tile of x has M rows. A tile of the weight has
P numbers along the dimension that the product keeps, and R along the one that it sums over.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.ops.triton.card import cdiv, measured_on, on_its_card
from accessory.ops.triton.nibbles import finished, permutes


@triton.jit
def find_tile(count_ptr, tile, E: tl.constexpr, SLOTS: tl.constexpr, COUNTED: tl.constexpr, M: tl.constexpr, N):
    """(expert, first row, end of the expert's rows) of tile number `tile` of M rows. Expert E: no such tile exists.

    Without counts there is one expert, and it has all rows.
    """
    if COUNTED:
        e = tl.arange(0, SLOTS)
        count = tl.load(count_ptr + e, mask=e < E, other=0).to(tl.int32)
        tiles = (count + M - 1) // M
        tiles_before, rows_before = tl.cumsum(tiles, 0) - tiles, tl.cumsum(count, 0) - count
        mine = (tiles_before <= tile) & (tile < tiles_before + tiles)
        first = tl.sum(tl.where(mine, rows_before + (tile - tiles_before) * M, 0), 0)
        end = tl.sum(tl.where(mine, rows_before + count, 0), 0)
        expert = tl.sum(tl.where(mine, e, 0), 0)
        return tl.where(tl.sum(mine.to(tl.int32), 0) == 0, E, expert), first, end
    else:
        return 0, tile * M, N


@triton.jit
def place(
    count_ptr, N, KEEPS: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr, COUNTED: tl.constexpr,
    M: tl.constexpr, P: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """(block, expert, first row, end of the expert's rows) of this program.

    A block is P numbers along the dimension that the product keeps. SIDE consecutive programs take SIDE blocks of the
    same rows.
    """
    across: tl.constexpr = (KEEPS + P - 1) // P
    tiles = tl.num_programs(0) // across
    turn = tl.program_id(0) // (SIDE * tiles)
    side = tl.minimum(across - turn * SIDE, SIDE)
    within = tl.program_id(0) % (SIDE * tiles)
    e, first, end = find_tile(count_ptr, within // side, E, SLOTS, COUNTED, M, N)
    return turn * SIDE + within % side, e, first, end


def grid(N: int, E: int, keeps: int, tile: dict[str, Any]) -> tuple[int]:
    """The most programs that N rows of E experts need: the last tile of every expert may be short."""
    return (min(N, cdiv(N, tile["M"]) + E - 1) * cdiv(keeps, tile["P"]),)


@cache
def slots(E: int) -> int:
    """The length of the vector that holds the experts' counts, a power of two."""
    return max(2, triton.next_power_of_2(E))


# Not compiled anew for numbers of rows that are 1 or multiples of 16: a row's bits must not depend on them.
@triton.jit(do_not_specialize=["N"])
def _product_kernel(
    x_ptr, w_ptr, count_ptr, from_ptr, to_ptr, scale_ptr, y_ptr, N, stride_e, stride_out, stride_in,
    OUT: tl.constexpr, IN: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr,
    GATHERS: tl.constexpr, SCATTERS: tl.constexpr, SCALES: tl.constexpr, ADDS: tl.constexpr,
    M: tl.constexpr, P: tl.constexpr, R: tl.constexpr, SIDE: tl.constexpr, SWAP: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """y_NO = x_NI Wᵀ of each row's expert. Rows behind the last expert's are left alone."""
    block, e, first, end = place(count_ptr, N, OUT, E, SLOTS, True, M, P, SIDE)
    if e < E:
        out = block * P + tl.arange(0, P)
        row = first + tl.arange(0, M)
        out_held, row_held = tl.minimum(out, OUT - 1), tl.minimum(row, end - 1)
        at_row = tl.load(from_ptr + row_held) if GATHERS else row_held
        col = tl.arange(0, R)
        at_x = x_ptr + at_row[:, None].to(tl.int64) * IN + col[None, :]
        w_ptr += e.to(tl.int64) * stride_e
        at_w = w_ptr + out_held[:, None].to(tl.int64) * stride_out + col[None, :].to(tl.int64) * stride_in
        acc = tl.zeros((P, M) if SWAP else (M, P), dtype=tl.float32)
        for start in range(0, IN, R):
            if IN % R == 0:
                w, x = tl.load(at_w), tl.load(at_x)
            else:
                left = IN - start
                w = tl.load(at_w, mask=col[None, :] < left, other=0.0)
                x = tl.load(at_x, mask=col[None, :] < left, other=0.0)
            if SWAP:
                acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
            else:
                acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
            # The left operand may come from registers where rows are not aligned, and where it is a weight that is
            # stored the other way round. `finished` says what that needs.
            if SWAP or IN % R != 0:
                acc = finished(acc, WAITS)
            at_w += R * stride_in
            at_x += R
        y = tl.trans(acc) if SWAP else acc
        if SCALES:
            y *= tl.load(scale_ptr + row_held).to(tl.float32)[:, None]
        to_row = tl.load(to_ptr + row_held) if SCATTERS else row_held
        at_y = y_ptr + to_row[:, None].to(tl.int64) * OUT + out[None, :]
        held = (row[:, None] < end) & (out[None, :] < OUT)
        if ADDS:
            y += tl.load(at_y, mask=held, other=0.0).to(tl.float32)
        tl.store(at_y, y.to(y_ptr.dtype.element_ty), mask=held)


# Tile sizes by the most rows an expert: (M, P, R, SIDE, SWAP, warps, stages). Few rows: weights are read once and as
# wide as possible, with the weight as the tensor cores' left operand, because that one has at least 64 rows. fp32 is
# multiplied without tensor cores, from registers, so its tiles are small. `accessory tune` times them all.
TILES_16_BITS = {
    12: (16, 64, 128, 1, True, 4, 4),
    24: (32, 64, 128, 1, True, 4, 4),
    96: (64, 128, 64, 1, False, 4, 4),
    2**62: (128, 128, 64, 8, False, 8, 3),
}
TILES_32_BITS = {12: (16, 32, 32, 1, False, 4, 4), 2**62: (64, 64, 16, 4, False, 8, 3)}


def tile_of(sizes: tuple[Any, ...], out_features: int, in_features: int) -> dict[str, Any]:
    """A row of the tables above as the kernel takes it, not larger than the weight itself."""
    M, P, R, SIDE, SWAP, warps, stages = sizes
    P, R = min(P, max(16, triton.next_power_of_2(out_features))), min(R, max(16, triton.next_power_of_2(in_features)))
    return {"M": M, "P": P, "R": R, "SIDE": SIDE, "SWAP": SWAP, "num_warps": warps, "num_stages": stages}


@on_its_card
def product(
    x_NI: Tensor,
    weight_EOI: Tensor,
    count_E: Tensor,
    *,
    from_N: Tensor | None = None,
    scale_N: Tensor | None = None,
    to_N: Tensor | None = None,
    add_to: Tensor | None = None,
    tile: dict[str, Any] | None = None,
    as_rows: float | None = None,
) -> Tensor:
    """Rows of x, sorted by expert, times their expert's weight: (N, O) in x's dtype, which is the weights' too.

    Rows behind the last expert's (another rank's) stay uninitialised. from_N: row n is x[from_N[n]], so N is its
    length. scale_N: fp32, multiplies each row of the result. add_to: a contiguous tensor (…, O); the product is added
    to it in place, and it is returned. to_N: the row of `add_to` to which row n goes; no two rows may share one.
    as_rows: take the tile for so many rows an expert, by default for as many as there are.
    """
    (E, O, I), N = weight_EOI.shape, len(x_NI if from_N is None else from_N)  # noqa: E741
    x_NI = x_NI.contiguous()
    y_NO = torch.empty(N, O, dtype=x_NI.dtype, device=x_NI.device) if add_to is None else add_to
    assert x_NI.dtype == weight_EOI.dtype, "the caller casts the weights"
    assert y_NO.is_contiguous(), "rows are found by the number of columns"
    if N == 0:
        return y_NO
    rows = N / E if as_rows is None else as_rows
    if tile is None:
        tile = measured_on(x_NI.device, "grouped", "none", O, I, rows) if x_NI.element_size() == 2 else None
    if tile is None:
        table = TILES_32_BITS if x_NI.dtype == torch.float32 else TILES_16_BITS
        tile = tile_of(next(sizes for most, sizes in table.items() if most >= rows), O, I)
    _product_kernel[grid(N, E, O, tile)](
        x_NI, weight_EOI, count_E, *(count_E if t is None else t for t in (from_N, to_N)),
        x_NI if scale_N is None else scale_N, y_NO, N, *weight_EOI.stride(),
        OUT=O, IN=I, E=E, SLOTS=slots(E), GATHERS=from_N is not None, SCATTERS=to_N is not None,
        SCALES=scale_N is not None, ADDS=add_to is not None, WAITS=permutes(), **tile,
    )  # fmt: skip
    return y_NO
