"""Attention over pages on a GPU: keys and values are read where they lie, once for all query heads of a group.

A program takes a few queries of one sequence, with the R query heads of one key/value head as neighbouring rows of one
tile, and passes over the keys that they see with a running softmax in base 2 (FlashAttention, arXiv 2205.14135). Where
there are too few programs for the card, several share the keys of a sequence ("splits"): each writes its own sum, and a
second kernel combines them. All launches are fixed by numbers that the host knows. What a program reads follows from
the lengths on the device, so a CUDA graph serves every length.

Legend: N new tokens, B sequences, C = B + 1, P pages, S tokens of a page, H query heads, G key/value heads, R = H/G,
d head_dim, K splits. A tile has M rows (queries × heads) and reads KEYS keys at a time; D is d, rounded up to a power
of two, HEADS likewise R.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.limits import PAGE_SIZE
from accessory.ops.attention import has_varlen, packed_attention
from accessory.ops.paged_attention import PagedBatch, Pages
from accessory.ops.quantized import FP8_LARGEST
from accessory.ops.triton.card import cdiv, on_its_card
from accessory.ops.triton.overlap import let_next_begin, overlap, wait_for_inputs

# Stands for the largest score of no keys. Minus infinity would make NaN of the difference of two such.
NOTHING = tl.constexpr(-1e30)
# The most splits of a sequence: `_combine_kernel` holds the parts of all.
MOST_SPLITS = 64


@triton.jit
def _pass_over(
    acc, top, total, q, seen, length, from_, to, g, temperature,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_ptr, P,
    G: tl.constexpr, d: tl.constexpr, S: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
    FP8: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys of the tiles `from_` … `to` - 1 into the running softmax (acc, top, total).

    MASKED: some rows do not see all of these keys; a row sees those up to position `seen`.
    """
    n = tl.arange(0, KEYS)
    c = tl.arange(0, D)
    page = tl.load(page_ptr + tl.minimum(from_ * KEYS // S, P - 1)).to(tl.int64)
    for tile in range(from_, to):
        at = (page * S + tile * KEYS % S + n) * G + g
        # The next page's number is there when its keys are asked for, so keys are loaded ahead.
        page = tl.load(page_ptr + tl.minimum((tile + 1) * KEYS // S, P - 1)).to(tl.int64)
        # What lies beyond the length may be NaN, and 0 · NaN is NaN. Without a mask where none is needed.
        within = tile * KEYS + n < length
        cell = within[:, None] & (c < d)[None, :] if MASKED or d < D else None
        k = tl.load(k_ptr + at[:, None] * d + c[None, :], mask=cell, other=None if cell is None else 0.0)
        v = tl.load(v_ptr + at[:, None] * d + c[None, :], mask=cell, other=None if cell is None else 0.0)
        # By way of fp32: Triton converts fp8 to bf16 directly only on Hopper. For 16 bits this is no conversion at all.
        score = tl.dot(q, tl.trans(k.to(tl.float32).to(q.dtype)), input_precision="ieee") * temperature
        if FP8:
            score *= tl.load(k_scale_ptr + at)[None, :]
        if MASKED:
            score = tl.where(tile * KEYS + n[None, :] <= seen[:, None], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(p, 1)
        if FP8:
            p *= tl.load(v_scale_ptr + at, mask=within, other=0.0)[None, :]
        acc = tl.dot(p.to(q.dtype), v.to(tl.float32).to(q.dtype), acc * fade[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["first", "P", "splits", "least"])
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_ptr, length_ptr, query_ptr, y_ptr,
    part_ptr, top_ptr, total_ptr, q_stride, first, P, splits, least, temperature,
    G: tl.constexpr, R: tl.constexpr, d: tl.constexpr, S: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, DECODE: tl.constexpr, SPLIT: tl.constexpr, FP8: tl.constexpr,
    FIXED: tl.constexpr = False, OVERLAPS: tl.constexpr = False,
):  # fmt: skip
    """A tile of queries of one sequence, one key/value head, one split: y_NHd, or with SPLIT its part of the sum.

    first: the first sequence of this launch, and also its first query, as all before it have one each. DECODE: every
    sequence has one. least: the fewest tiles of keys for which a split is worth while. FIXED: a query's bits must not
    depend on the other queries.
    """
    wait_for_inputs(OVERLAPS)
    QUERIES: tl.constexpr = M // HEADS
    b = first + tl.program_id(2)
    g = tl.program_id(1) % G
    split = tl.program_id(1) // G
    length = tl.load(length_ptr + b)
    if DECODE:
        begin, queries, from_query = b, 1, 0
    else:
        begin = tl.load(query_ptr + b)
        queries = tl.load(query_ptr + b + 1) - begin
        # The last queries see the most keys, so their programs start first.
        from_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    if from_query < queries:
        row = tl.arange(0, M)
        c = tl.arange(0, D)
        query = from_query + row // HEADS
        head = row % HEADS
        held = (query < queries) & (head < R)
        cell = held[:, None] & (c[None, :] < d)
        seen = length - queries + query
        before = length - queries + from_query  # keys that the first query of the tile sees, but for its own
        until = length - queries + tl.minimum(from_query + QUERIES, queries)  # keys that its last query sees
        tiles = tl.cdiv(until, KEYS)
        # Tiles of which every query sees all keys. Which these are depends on the tile of queries, and without a mask
        # the compiler rounds otherwise.
        whole = 0 if FIXED else (before + 1) // KEYS
        from_, to = 0, tiles
        if SPLIT:
            share = tl.maximum(tl.cdiv(tiles, splits), least)
            from_ = split * share
            to = tl.minimum(from_ + share, tiles)
        q_at = (begin + query).to(tl.int64) * q_stride + (g * R + head) * d
        q = tl.load(q_ptr + q_at[:, None] + c[None, :], mask=cell, other=0.0)
        if FP8 and q_ptr.dtype.element_ty == tl.float16:
            q = q.to(tl.bfloat16)  # fp16 has no room for probabilities times scales
        acc = tl.zeros((M, D), dtype=tl.float32)
        top = tl.full((M,), NOTHING, dtype=tl.float32)
        total = tl.zeros((M,), dtype=tl.float32)
        page_ptr += b.to(tl.int64) * P
        acc, top, total = _pass_over(
            acc, top, total, q, seen, length, from_, tl.minimum(to, whole), g, temperature,
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_ptr, P, G, d, S, KEYS, D, FP8, False,
        )  # fmt: skip
        acc, top, total = _pass_over(
            acc, top, total, q, seen, length, tl.maximum(from_, whole), to, g, temperature,
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_ptr, P, G, d, S, KEYS, D, FP8, True,
        )  # fmt: skip
        let_next_begin(OVERLAPS)
        y_row = (begin + query).to(tl.int64) * (G * R) + g * R + head
        if SPLIT:
            part = (y_row - first.to(tl.int64) * (G * R)) * splits + split
            tl.store(top_ptr + part, top, mask=held)
            tl.store(total_ptr + part, total, mask=held)
            if from_ < to:
                tl.store(part_ptr + part[:, None] * d + c[None, :], acc, mask=cell)
        else:
            y = acc / total[:, None]
            tl.store(y_ptr + y_row[:, None] * d + c[None, :], y.to(y_ptr.dtype.element_ty), mask=cell)


@triton.jit(do_not_specialize=["first", "splits"])
def _combine_kernel(
    part_ptr, top_ptr, total_ptr, y_ptr, first, splits, d: tl.constexpr, D: tl.constexpr, MOST: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):  # fmt: skip
    """y of one query head from the parts of its splits. A split that saw no keys wrote a total of 0 and no part."""
    let_next_begin(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, MOST)
    c = tl.arange(0, D)
    top = tl.load(top_ptr + row * splits + k, mask=k < splits, other=NOTHING)
    total = tl.load(total_ptr + row * splits + k, mask=k < splits, other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    cell = (total > 0)[:, None] & (c[None, :] < d)
    part = tl.load(part_ptr + (row * splits + k)[:, None] * d + c[None, :], mask=cell, other=0.0)
    y = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(y_ptr + (first + row) * d + c, y.to(y_ptr.dtype.element_ty), mask=c < d)


@triton.jit
def _rotated(x_ptr, heads, rotation_ptr, count, d: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr):
    """The `heads` of a token's `count` vectors, turned by the token's angles: (HEADS, D)."""
    c = tl.arange(0, D)
    x = tl.load(x_ptr + heads[:, None] * d + c[None, :], mask=(heads < count)[:, None] & (c < d)[None, :], other=0.0)
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (HEADS, D // 2, 2)))
    p = tl.arange(0, D // 2)
    cos = tl.load(rotation_ptr + 2 * p, mask=p < d // 2, other=0.0)[None, :]
    sin = tl.load(rotation_ptr + 2 * p + 1, mask=p < d // 2, other=0.0)[None, :]
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, (HEADS, D)).to(x_ptr.dtype.element_ty)


@triton.jit
def _write_kernel(
    q_ptr, k_ptr, v_ptr, rotation_ptr, slot_ptr, k_pool_ptr, v_pool_ptr, k_scale_ptr, v_scale_ptr,
    q_out_ptr, k_out_ptr, q_stride, k_stride, v_stride,
    H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr,
    FP8: tl.constexpr, LARGEST: tl.constexpr, OVERLAPS: tl.constexpr = False,
):  # fmt: skip
    """Program 0 of a token: its rotated keys and its values to their slot. The others: HEADS rotated queries."""
    let_next_begin(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, D)
    rotation_ptr += token * (d // 2) * 2
    if tl.program_id(1) > 0:
        h = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)
        q = _rotated(q_ptr + token * q_stride, h, rotation_ptr, H, d, HEADS, D)
        at_q = q_out_ptr + (token * H + h)[:, None] * d + c[None, :]
        tl.store(at_q, q, mask=(h < H)[:, None] & (c < d)[None, :])
        return
    slot = tl.load(slot_ptr + token)
    g = tl.arange(0, GROUPS)
    at = g[:, None] * d + c[None, :]
    cell = (g < G)[:, None] & (c < d)[None, :]
    k = _rotated(k_ptr + token * k_stride, g, rotation_ptr, G, d, GROUPS, D)
    v = tl.load(v_ptr + token * v_stride + at, mask=cell, other=0.0)

    tl.store(k_out_ptr + token * (G * d) + at, k, mask=cell)
    if FP8:
        k, v = k.to(tl.float32), v.to(tl.float32)
        # Exact quotients: 16-bit numbers over a scale are often halfway between two of fp8, and a GPU's quick division
        # would round those the other way.
        k_scale = tl.maximum(tl.div_rn(tl.max(tl.abs(k), 1), LARGEST + tl.zeros((GROUPS,), tl.float32)), 1e-12)
        v_scale = tl.maximum(tl.div_rn(tl.max(tl.abs(v), 1), LARGEST + tl.zeros((GROUPS,), tl.float32)), 1e-12)
        tl.store(k_scale_ptr + slot * G + g, k_scale, mask=g < G)
        tl.store(v_scale_ptr + slot * G + g, v_scale, mask=g < G)
        k = tl.div_rn(k, tl.broadcast_to(k_scale[:, None], (GROUPS, D)))
        v = tl.div_rn(v, tl.broadcast_to(v_scale[:, None], (GROUPS, D)))
    tl.store(k_pool_ptr + slot * (G * d) + at, k.to(k_pool_ptr.dtype.element_ty), mask=cell)
    tl.store(v_pool_ptr + slot * (G * d) + at, v.to(v_pool_ptr.dtype.element_ty), mask=cell)


class Tile(NamedTuple):
    """How a program is cut: rows, keys at a time, warps, stages of the pipeline that loads keys."""

    M: int
    KEYS: int
    warps: int
    stages: int


# The tile by its rows (queries × heads of a group): for the most rows that a sequence brings. Keys of more than 256
# bytes come 32 at a time, so that the tiles fit shared memory.
TILES = {16: Tile(16, 64, 4, 3), 64: Tile(64, 64, 4, 3), 2**62: Tile(128, 64, 8, 3)}
TILES_OF_LARGE_KEYS = {16: Tile(16, 32, 4, 2), 2**62: Tile(32, 32, 4, 2)}
# Query heads that a program rotates.
HEADS_A_PROGRAM = 8
# Decoding: keys are split until each processor of the card has this many programs.
PROGRAMS_A_PROCESSOR = 2
# Decoding: no program passes over more keys, so that one long sequence does not keep the others waiting.
MOST_KEYS = 4096
# Where there are programs enough without splits, a split has at least this many keys.
LEAST_KEYS = 256
# Where a row's bits must not depend on the others, decoding's splits have so many keys, from the first key on. They
# have more where MOST_SPLITS of them do not hold the longest sequence that the cache may have.
FIXED_KEYS = 256


@on_its_card
def rotate_and_write(
    pages: Pages, slot_N: Tensor, q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, rotation_N1c: Tensor
) -> tuple[Tensor, Tensor]:
    """`ops.paged_attention.rotate_and_write` in one launch."""
    (N, H, d), G = q_NHd.shape, k_NGd.shape[1]
    q_NHd, k_NGd, v_NGd = _rows(q_NHd), _rows(k_NGd), _rows(v_NGd)
    turned_NHd, turned_NGd = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_NHd, k_NGd))
    heads = min(HEADS_A_PROGRAM, triton.next_power_of_2(H))
    _write_kernel[(N, 1 + cdiv(H, heads))](
        q_NHd, k_NGd, v_NGd, torch.view_as_real(rotation_N1c), slot_N, *_pointers(pages), turned_NHd, turned_NGd,
        q_NHd.stride(0), k_NGd.stride(0), v_NGd.stride(0),
        H=H, G=G, d=d, HEADS=heads, GROUPS=triton.next_power_of_2(G), D=triton.next_power_of_2(d),
        FP8=pages.fp8, LARGEST=FP8_LARGEST, **overlap(q_NHd),
    )  # fmt: skip
    return turned_NHd, turned_NGd


@on_its_card
def attention(q_NHd: Tensor, pages: Pages, batch: PagedBatch, new: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`ops.paged_attention.paged_attention`. Prompts without earlier context take torch's kernel for packed rows."""
    q_NHd, decodes = _rows(q_NHd), batch.decodes
    prompts = len(batch.length_B) - decodes
    fresh = batch.fresh and new is not None and not pages.fp8
    if prompts and fresh and has_varlen(q_NHd.device, q_NHd.dtype):
        assert new is not None
        # It takes each decode for a prompt of one token. The decodes' true outputs are written over that.
        y_NHd = packed_attention(q_NHd, *new, batch.query_C, batch.longest)
    else:
        y_NHd = torch.empty(q_NHd.shape, dtype=q_NHd.dtype, device=q_NHd.device)
        if prompts:
            _launch(q_NHd, pages, batch, y_NHd, decodes, prompts, batch.longest)
    if decodes:
        _launch(q_NHd, pages, batch, y_NHd, 0, decodes, 0)
    return y_NHd


@on_its_card
def fixed_attention(q_NHd: Tensor, pages: Pages, batch: PagedBatch, new: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The same, but a query's bits depend on its own keys alone, however its prompt was cut: one tile, equal splits.

    Either all sequences decode or none does. Two batches compare only where `longest_length` is the same.
    """
    q_NHd = _rows(q_NHd)
    y_NHd = torch.empty(q_NHd.shape, dtype=q_NHd.dtype, device=q_NHd.device)
    assert batch.decodes in (0, len(batch.length_B)), "tokens that decode and prompts run apart"
    _launch(q_NHd, pages, batch, y_NHd, 0, len(batch.length_B), 0 if batch.decodes else batch.longest, fixed=True)
    return y_NHd


def _pointers(pages: Pages) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer's tensors for the kernels. The numbers stand in for scales that there are not."""
    k, v, k_scale, v_scale = pages.k_PSGd, pages.v_PSGd, pages.k_scale_PSG, pages.v_scale_PSG
    return k, v, k if k_scale is None else k_scale, v if v_scale is None else v_scale


def _launch(
    q_NHd: Tensor,
    pages: Pages,
    batch: PagedBatch,
    y_NHd: Tensor,
    first: int,
    sequences: int,
    longest: int,
    fixed: bool = False,
) -> None:
    """Attention of `sequences` sequences from `first` on, of at most `longest` queries each; 0: one query each.

    fixed: with a tile and splits that depend on no batch.
    """
    (_, H, d), G = q_NHd.shape, pages.k_PSGd.shape[2]
    R = H // G
    heads, D = triton.next_power_of_2(R), max(16, triton.next_power_of_2(d))
    rows = 2**62 if fixed and longest else max(longest, 1) * heads
    tile = tile_of(rows, D * q_NHd.element_size())
    M = max(tile.M, heads)
    tiles = cdiv(max(longest, 1), M // heads)
    # Where other sequences may be empty, one alone must keep the card busy if its keys are many.
    alone = batch.padded and longest > 0
    programs, processors = tiles * G * (1 if alone else sequences), _processors(q_NHd.device)
    splits = splits_of(programs, processors, batch.longest_length, decode=longest == 0)
    least = LEAST_KEYS if programs >= processors or alone else 1
    if fixed:
        # Without splits the kernel shares nothing, and with them each takes `least` keys: it never needs more.
        least = max(FIXED_KEYS, PAGE_SIZE * cdiv(batch.longest_length, PAGE_SIZE * MOST_SPLITS))
        splits = 1 if longest else cdiv(batch.longest_length, least)
    rows = (sequences if longest == 0 else len(q_NHd) - first) * H if splits > 1 else 0
    part_NHKd, top_NHK, total_NHK = (
        torch.empty(rows * splits * n, dtype=torch.float32, device=q_NHd.device) for n in (d, 1, 1)
    )
    _attend_kernel[(tiles, G * splits, sequences)](
        q_NHd, *_pointers(pages), batch.page_BP, batch.length_B, batch.query_C, y_NHd, part_NHKd, top_NHK, total_NHK,
        q_NHd.stride(0), first, batch.page_BP.shape[1], splits, cdiv(least, tile.KEYS),
        math.log2(math.e) / d**0.5,
        G=G, R=R, d=d, S=PAGE_SIZE, M=M, KEYS=tile.KEYS, HEADS=heads, D=D,
        DECODE=longest == 0, SPLIT=splits > 1, FP8=pages.fp8, FIXED=fixed, num_warps=tile.warps, num_stages=tile.stages,
        **overlap(q_NHd),
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(rows,)](
            part_NHKd, top_NHK, total_NHK, y_NHd, first * H, splits, d=d, D=triton.next_power_of_2(d), MOST=MOST_SPLITS,
            **overlap(q_NHd),
        )  # fmt: skip


def tile_of(rows: int, row_bytes: int) -> Tile:
    table = TILES if row_bytes <= 256 else TILES_OF_LARGE_KEYS
    return next(tile for most, tile in table.items() if rows <= most)


def splits_of(programs: int, processors: int, longest_length: int, decode: bool) -> int:
    """How many programs share the keys of a sequence, when there are `programs` without sharing.

    Prompts are split only to keep the card busy: their parts are large.
    """
    if decode:
        wanted = max(cdiv(PROGRAMS_A_PROCESSOR * processors, programs), cdiv(longest_length, MOST_KEYS))
    else:
        wanted = max(1, processors // programs)
    return min(wanted, cdiv(longest_length, PAGE_SIZE), MOST_SPLITS)


@cache
def _processors(device: torch.device) -> int:
    """The card's multiprocessors; in Triton's interpreter, those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _rows(x_NHd: Tensor) -> Tensor:
    """x with the heads of a token side by side, as the kernels expect; a copy only where they are not."""
    return x_NHd if x_NHd.stride()[1:] == (x_NHd.shape[2], 1) else x_NHd.contiguous()
