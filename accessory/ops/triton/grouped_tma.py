"""Grouped products of many rows: tiles arrive by TMA, which Hopper and newer cards have.

Three products of a layer's forward and backward pass: rows times their expert's weight, gradients times the weight as
it lies, and the weights' gradients, which sum over an expert's rows. Rows are sorted by expert; their counts stay on
the device (see `grouped`). A product of low rank, a LoRA adapter's, is added to a tile before it is written.

On an H100 and H200, tiles of 128 × 256 reach 0.95 to 1.3 times the speed of torch's grouped product.

Legend: N rows sorted by expert, E experts, OUT out and IN in features, r rank. A tile has M rows and P columns; R
numbers of a sum are taken at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from accessory.ops.dense_products import Term
from accessory.ops.triton.card import cdiv, multiprocessors, on_its_card, shared_bytes
from accessory.ops.triton.grouped import grid, place, slots
from accessory.ops.triton.nibbles import finished, permutes


@triton.jit
def _add_low(
    acc, low_ptr, b_ptr, e, row, col, N, OUT: tl.constexpr, RANK: tl.constexpr, SLOTS: tl.constexpr, BACK: tl.constexpr
):  # fmt: skip
    """acc plus low (N, RANK) times b of expert e: (OUT, RANK), or with BACK (RANK, OUT)."""
    r = tl.arange(0, SLOTS)
    held = (r < RANK)[None, :]
    low = tl.load(low_ptr + row[:, None].to(tl.int64) * RANK + r[None, :], mask=(row < N)[:, None] & held, other=0.0)
    b_ptr += e.to(tl.int64) * OUT * RANK
    at = r[None, :] * OUT + col[:, None] if BACK else col[:, None] * RANK + r[None, :]
    b = tl.load(b_ptr + at, mask=(col < OUT)[:, None] & held, other=0.0)
    return tl.dot(low, tl.trans(b), acc, input_precision="ieee")


@triton.jit
def _add_product(
    acc, x_desc, w_desc, e, first, block, OUT: tl.constexpr, IN: tl.constexpr, BACK: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """acc plus as many rows of x, from `first` on, times a block of P columns of expert e's weight."""
    for start in range(0, IN, R):
        x = x_desc.load([first, start])
        if BACK:
            acc = tl.dot(x, w_desc.load([e * IN + start, block * P]), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(w_desc.load([e * OUT + block * P, start])), acc, input_precision="ieee")
    return acc


@triton.jit
def _write_tile(
    x_desc, w_desc, low_ptr, b_ptr, x2_desc, w2_desc, low2_ptr, b2_ptr, y_ptr, N, block, e, first, end,
    OUT: tl.constexpr, IN: tl.constexpr, BACK: tl.constexpr, TWO: tl.constexpr,
    RANK: tl.constexpr, RANK2: tl.constexpr, LOW: tl.constexpr, LOW2: tl.constexpr,
    M: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """M rows of y from `first` on, of which those from `end` on are another expert's."""
    acc = tl.zeros((M, P), dtype=tl.float32)
    acc = _add_product(acc, x_desc, w_desc, e, first, block, OUT, IN, BACK, P, R)
    if TWO:
        acc = _add_product(acc, x2_desc, w2_desc, e, first, block, OUT, IN, BACK, P, R)
    row, col = first + tl.arange(0, M), block * P + tl.arange(0, P)
    if RANK > 0:
        acc = _add_low(acc, low_ptr, b_ptr, e, row, col, N, OUT, RANK, LOW, BACK)
    if RANK2 > 0:
        acc = _add_low(acc, low2_ptr, b2_ptr, e, row, col, N, OUT, RANK2, LOW2, BACK)
    at_y = y_ptr + row[:, None].to(tl.int64) * OUT + col[None, :]
    tl.store(at_y, acc.to(y_ptr.dtype.element_ty), mask=(row < end)[:, None] & (col < OUT)[None, :])


@triton.jit(do_not_specialize=["N"])
def _product_kernel(
    x_desc, few_desc, w_desc, low_ptr, b_ptr, x2_desc, few2_desc, w2_desc, low2_ptr, b2_ptr, count_ptr, y_ptr, N,
    OUT: tl.constexpr, IN: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr, BACK: tl.constexpr, TWO: tl.constexpr,
    RANK: tl.constexpr, RANK2: tl.constexpr, LOW: tl.constexpr, LOW2: tl.constexpr,
    M: tl.constexpr, FEW: tl.constexpr, P: tl.constexpr, R: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """y (N, OUT) = x (N, IN) times the transpose of each row's expert's w (OUT, IN), or with BACK times w (IN, OUT).
    With TWO a second such product is added. An expert's last tile has FEW rows where no more are left, because a few
    rows would cost as much as M."""
    block, e, first, end = place(count_ptr, N, OUT, E, SLOTS, True, M, P, SIDE)
    if e < E:
        if FEW > 0 and end - first <= FEW:
            _write_tile(
                few_desc, w_desc, low_ptr, b_ptr, few2_desc, w2_desc, low2_ptr, b2_ptr, y_ptr, N, block, e, first, end,
                OUT, IN, BACK, TWO, RANK, RANK2, LOW, LOW2, FEW, P, R,
            )  # fmt: skip
        else:
            _write_tile(
                x_desc, w_desc, low_ptr, b_ptr, x2_desc, w2_desc, low2_ptr, b2_ptr, y_ptr, N, block, e, first, end,
                OUT, IN, BACK, TWO, RANK, RANK2, LOW, LOW2, M, P, R,
            )  # fmt: skip


@triton.jit
def _weights_kernel(
    dy_desc, x_desc, dy_ptr, x_ptr, count_ptr, dw_ptr, squares_ptr, OUT: tl.constexpr, IN: tl.constexpr,
    E: tl.constexpr, SLOTS: tl.constexpr, ADDS: tl.constexpr, WAITS: tl.constexpr, SQUARES: tl.constexpr,
    M: tl.constexpr, P: tl.constexpr, R: tl.constexpr, SIDE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """dw (E, OUT, IN) = Σ over an expert's rows of dy (N, OUT) times x (N, IN); ADDS: on top of what dw holds.
    SQUARES: each tile leaves the sum of its numbers' squares, as they are written, at its place in squares.

    A program takes tiles one after the other, so that it loads the next one's rows while it writes.
    """
    ACROSS: tl.constexpr = (OUT + M - 1) // M
    DOWN: tl.constexpr = (IN + P - 1) // P
    slot = tl.arange(0, SLOTS)
    count = tl.load(count_ptr + slot, mask=slot < E, other=0).to(tl.int32)
    for tile in tl.range(tl.program_id(0), E * ACROSS * DOWN, PROGRAMS, flatten=True):
        e = tile // (ACROSS * DOWN)
        within = tile % (ACROSS * DOWN)
        turn = within // (SIDE * DOWN)
        side = tl.minimum(ACROSS - turn * SIDE, SIDE)
        out = (turn * SIDE + within % (SIDE * DOWN) % side) * M
        in_ = within % (SIDE * DOWN) // side * P
        first = tl.sum(tl.where(slot < e, count, 0), 0)
        rows = tl.sum(tl.where(slot == e, count, 0), 0)
        whole = rows // R * R
        acc = tl.zeros((M, P), dtype=tl.float32)
        for start in range(0, whole, R):
            dy = dy_desc.load([first + start, out])
            acc = tl.dot(tl.trans(dy), x_desc.load([first + start, in_]), acc, input_precision="ieee")
        col, row = in_ + tl.arange(0, P), out + tl.arange(0, M)
        if whole < rows:  # behind the last rows come another expert's, which TMA cannot leave out
            n = first + whole + tl.arange(0, R)
            held = (n < first + rows)[:, None]
            n = n[:, None].to(tl.int64)
            dy = tl.load(dy_ptr + n * OUT + row[None, :], mask=held & (row < OUT)[None, :], other=0.0)
            x = tl.load(x_ptr + n * IN + col[None, :], mask=held & (col < IN)[None, :], other=0.0)
            acc = finished(tl.dot(tl.trans(dy), x, acc, input_precision="ieee"), WAITS)
        at = dw_ptr + tl.cast(e, tl.int64) * (OUT * IN) + row[:, None].to(tl.int64) * IN + col[None, :]
        inside = (row < OUT)[:, None] & (col < IN)[None, :]
        if ADDS:
            inside &= rows > 0  # nothing is added, so what is there is neither read nor written
            acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        value = acc.to(dw_ptr.dtype.element_ty)
        tl.store(at, value, mask=inside)
        if SQUARES:  # beyond the ends of dw, acc is zero
            written = value.to(tl.float32)
            total = tl.sum(tl.sum(written * written, 1), 0)
            if ADDS:
                tl.store(squares_ptr + tile, total, mask=rows > 0)
            else:
                tl.store(squares_ptr + tile, total)


# (M, P, R, SIDE, warps, stages), the best of 24 on an H200 at Mixtral-8x7B's sizes; fp32 is for Triton's interpreter.
TILE = (128, 256, 64, 4, 8, 4)
TILE_WEIGHTS = (128, 256, 64, 8, 8, 4)
NARROW = 64  # columns, as many as a LoRA adapter's rank
TILE_NARROW = (64, 64, 128, 8, 4, 4)
TILE_NARROW_ROWS = (64, 128, 64, 8, 4, 4)
TILE_32_BITS = (64, 64, 16, 4, 8, 2)


@cache
def _tile(number: int, columns: int, shared: int, rows: int | None = None) -> dict[str, int]:
    """The tile of a result with so many columns, of inputs of `number` bytes each; rows: of a weight's gradient.

    shared: bytes of shared memory that a program may have. Cards with less than Hopper's load fewer blocks ahead.
    """
    sizes = TILE if rows is None else TILE_WEIGHTS if rows > NARROW else TILE_NARROW_ROWS
    if columns <= NARROW:
        sizes = TILE_NARROW
    if number == 4:
        sizes = TILE_32_BITS
    tile = dict(zip(("M", "P", "R", "SIDE", "num_warps", "num_stages"), sizes, strict=True))
    tile["P"] = max(16, min(tile["P"], triton.next_power_of_2(columns)))
    while tile["num_stages"] > 2 and tile["num_stages"] * (tile["M"] + tile["P"]) * tile["R"] * number > shared:
        tile["num_stages"] -= 1
    return tile


def _blocks(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The tensor as a matrix of its last dimension's rows, in blocks that TMA loads. Beyond its ends are zeros."""
    width = tensor.shape[-1]
    return TensorDescriptor(tensor, [tensor.numel() // width, width], [width, 1], [rows, columns])


def _launch(terms: Sequence[Term], count_E: Tensor, back: bool) -> Tensor:
    x_NI, weight = terms[0][:2]
    (N, IN), E, OUT = x_NI.shape, len(weight), weight.shape[2 if back else 1]
    y_NO = torch.empty(N, OUT, dtype=x_NI.dtype, device=x_NI.device)
    if N == 0:
        return y_NO
    tile = _tile(x_NI.element_size(), OUT, shared_bytes(x_NI.device))
    M, P, R = tile["M"], tile["P"], tile["R"]
    few = M // 2 if M > 64 or x_NI.element_size() == 4 else 0  # tensor cores take no fewer than 64
    each: list[Any] = []
    for term in terms:
        assert term.x_NI.dtype == term.weight.dtype == x_NI.dtype, "the caller casts the weights"
        rows_NI = term.x_NI.contiguous()
        w_desc = _blocks(term.weight.contiguous(), R, P) if back else _blocks(term.weight.contiguous(), P, R)
        low, b = (None if t is None else t.contiguous() for t in term[2:])
        each += [_blocks(rows_NI, M, R), _blocks(rows_NI, few or M, R), w_desc, low, b]
    if len(terms) == 1:
        each += [None] * len(each)
    rank, rank2 = (0 if t.low_Nr is None else t.low_Nr.shape[1] for t in (terms[0], terms[-1]))
    _product_kernel[grid(N, E, OUT, tile)](
        *each, count_E, y_NO, N, OUT=OUT, IN=IN, E=E, SLOTS=slots(E), BACK=back, TWO=len(terms) == 2,
        RANK=rank, RANK2=rank2 if len(terms) == 2 else 0, LOW=_held(rank), LOW2=_held(rank2), FEW=few, **tile,
    )  # fmt: skip
    return y_NO


@cache
def _held(rank: int) -> int:
    return max(16, triton.next_power_of_2(max(rank, 1)))


@on_its_card
def product(x_NI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """Rows of x, sorted by expert, times their expert's weight: (N, O) in x's dtype, which is the weights' too.

    Rows behind the last expert's (another rank's) stay uninitialised.
    """
    return _launch([Term(x_NI, weight_EOI)], count_E, back=False)


@on_its_card
def gradient(dy_NO: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """The gradient of `product`'s input: dy times the stack as it lies, (N, I) in dy's dtype."""
    return _launch([Term(dy_NO, weight_EOI)], count_E, back=True)


@on_its_card
def sum_of_terms(count_E: Tensor, terms: Sequence[Term], back: bool) -> Tensor:
    """The sum of one or two `product`, or with `back` `gradient`, and of their parts of low rank, in one launch."""
    return _launch(terms, count_E, back)


@on_its_card
def weight_gradient(
    dy_NO: Tensor, x_NI: Tensor, count_E: Tensor, dtype: torch.dtype, out: Tensor | None = None, adds: bool = True,
    squares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of `product`'s weights, Σ over each expert's rows: (E, O, I) in `dtype`, summed in fp32.

    out: a contiguous gradient on top of which it is written, or, without `adds`, in its place; it is returned. An
    expert without rows gets zeros. squares: where the sums of its squares are left, one a tile.
    """
    dy_NO, x_NI = dy_NO.contiguous(), x_NI.contiguous()
    (_, OUT), IN, E = dy_NO.shape, x_NI.shape[1], len(count_E)
    dw_EOI = torch.empty(E, OUT, IN, dtype=dtype, device=dy_NO.device) if out is None else out
    assert dw_EOI.is_contiguous(), "numbers are found by the shape"
    tile = _tile(dy_NO.element_size(), IN, shared_bytes(dy_NO.device), OUT)
    tiles = E * cdiv(OUT, tile["M"]) * cdiv(IN, tile["P"])
    programs = min(tiles, (1 if tile["P"] == TILE_WEIGHTS[1] else 4) * multiprocessors(dy_NO.device))
    _weights_kernel[(programs,)](
        _blocks(dy_NO, tile["R"], tile["M"]), _blocks(x_NI, tile["R"], tile["P"]), dy_NO, x_NI, count_E, dw_EOI,
        squares, OUT=OUT, IN=IN, E=E, SLOTS=slots(E), ADDS=out is not None and adds, WAITS=permutes(),
        SQUARES=squares is not None, PROGRAMS=programs, **tile,
    )  # fmt: skip
    return dw_EOI
