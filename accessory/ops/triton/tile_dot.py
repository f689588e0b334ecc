"""A tile of rows times a tile of a weight, in any format, for few rows: the inner loops of `grouped_experts`.

With few rows a product's time is that of reading the weight, so the loop must unpack numbers as fast as they arrive.
Numbers go from memory to the tensor cores' registers by elementwise steps alone; any other order of them would take a
detour through shared memory. So scales are applied to sums, not to weights: int8's and fp8's once, at the end; those
of a 4-bit group to that group's sum. The two numbers of a byte belong to neighbouring inputs, which are multiplied in
two products: one of the even inputs with the high halves, one of the odd inputs with the low ones.

An expert's rows may be a few more than a power of two, and then a second tile would read and unpack its weight again.
So a tile may have MORE rows of x beside its M, which are multiplied by the same numbers.

Legend: M + MORE rows of x and P rows of the weight in a tile, OUT out and IN in features, G groups of a row. The loop
takes R numbers of a row at a time, or UNROLL groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accessory.ops.triton.nibbles import (
    byte_numbers,
    finished,
    held_words,
    nested_scale,
    nibble_bias,
    nibble_numbers,
    nibble_ones,
)

DENSE = tl.constexpr(-1)  # in place of one of `packed.CODES`


@triton.jit
def _multiply(x, w, acc, SWAP: tl.constexpr, WAITS: tl.constexpr):
    """acc + x wᵀ, (M, P); with SWAP its transpose, (P, M), which suits tensor cores whose left operand has 64 rows."""
    if SWAP:
        return finished(tl.dot(w, tl.trans(x), acc, input_precision="ieee"), WAITS)
    else:
        return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def _multiply_all(
    x, x_more, w, acc, acc_more, MORE: tl.constexpr, SWAP: tl.constexpr, WAITS: tl.constexpr
):  # fmt: skip
    """`_multiply` of the M rows and of MORE rows: (acc, acc_more)."""
    if MORE > 0:  # both begin before the first is waited for
        tl.static_assert(SWAP, "only a right operand may have fewer than 64 rows")
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        acc_more = tl.dot(w, tl.trans(x_more), acc_more, input_precision="ieee")
        return finished(acc, WAITS), finished(acc_more, WAITS)
    else:
        return _multiply(x, w, acc, SWAP, WAITS), acc_more


@triton.jit
def _inputs(at, held, left, WHOLE: tl.constexpr):
    """Held rows of x. A WHOLE row has no mask along it: even one that is always true prevents wide loads."""
    return tl.load(at, mask=held[:, None] if WHOLE else held[:, None] & left, other=0.0)


@triton.jit
def _scaled(acc, more, scale, MORE: tl.constexpr, SWAP: tl.constexpr):
    """(acc, more) times the scales of the weight's rows, (P,)."""
    scale = scale[:, None] if SWAP else scale[None, :]
    return acc * scale, more * scale if MORE > 0 else more


@triton.jit
def _even_and_odd(x_ptr, at_M, held_M, pair, IN: tl.constexpr):
    """The inputs 2·pair and 2·pair + 1 of rows, (M, pairs) each. Two 16-bit numbers are loaded as one word."""
    if x_ptr.dtype.element_ty.primitive_bitwidth == 16:
        kind: tl.constexpr = x_ptr.dtype.element_ty
        at = x_ptr.to(tl.pointer_type(tl.uint32)) + at_M[:, None] * (IN // 2) + pair[None, :]
        word = tl.load(at, mask=held_M[:, None], other=0)
        return (word & 0xFFFF).to(tl.uint16).to(kind, bitcast=True), (word >> 16).to(tl.uint16).to(kind, bitcast=True)
    else:
        at = x_ptr + at_M[:, None] * IN + 2 * pair[None, :]
        return tl.load(at, mask=held_M[:, None], other=0.0), tl.load(at + 1, mask=held_M[:, None], other=0.0)


@triton.jit
def _group_terms(
    scale_ptr, zero_ptr, offset_ptr, table_ptr, out, group, kind: tl.constexpr, G: tl.constexpr,
    CODE: tl.constexpr, STEPS: tl.constexpr, NESTED: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """(scale, zero), fp32 (P,): of the group `group` of the rows `out`. Only int4 has the second."""
    if CODE == 4:
        scale = nested_scale(scale_ptr, zero_ptr, offset_ptr, table_ptr, out, group, out >= 0, G, NESTED)
        return scale, scale
    else:
        scale = tl.load(scale_ptr + out * G + group).to(tl.float32)
        if CODE == 2:
            zero = tl.load(zero_ptr + out * G + group).to(tl.float32) * (1.0 / STEPS) + nibble_bias(kind, PERMUTE)
            return scale, zero
        else:
            return scale, scale


@triton.jit
def _add_group(
    acc, even, odd, total, byte, words, scale, zero, table_ptr,
    SWAP: tl.constexpr, CODE: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """acc plus one group's part: scale · (Σ x q - zero · Σ x). total: Σ x, in every column; only int4 needs it."""
    high, low = nibble_numbers(byte, words, table_ptr, even.dtype, CODE == 2, PERMUTE)
    part = _multiply(even, high, tl.zeros_like(acc), SWAP, PERMUTE)
    part = _multiply(odd, low, part, SWAP, PERMUTE)
    if CODE == 2:
        part -= total * (zero[:, None] if SWAP else zero[None, :])
    return acc + part * (scale[:, None] if SWAP else scale[None, :])


@triton.jit
def tile_dot(
    x_ptr, at_M, held_M, at_more, held_more,
    a_ptr, a_scale_ptr, a_zero_ptr, a_offset_ptr, b_ptr, b_scale_ptr, b_zero_ptr, b_offset_ptr,
    table_ptr, e, out, split, OUT: tl.constexpr, IN: tl.constexpr,
    M: tl.constexpr, MORE: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    UNROLL: tl.constexpr, SWAP: tl.constexpr, SPLITS: tl.constexpr, TWO: tl.constexpr,
    CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr, NESTED: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """(x aᵀ, x bᵀ), fp32 (M, P) each: rows `at_M` of x times the rows `out` of the e-th of the weights a and b. And the
    same of the rows `at_more`: (MORE, P) each.

    Rows of x that are not held are not read, and count as zero. `out` (P,) must exist in the weight. Without TWO there
    is no b, and its products are a's. Without MORE rows, which 4-bit formats never have, the last two are the first.
    The sum is that of part `split` of SPLITS parts of a row.
    """
    kind: tl.constexpr = x_ptr.dtype.element_ty
    tl.static_assert(MORE == 0 or CODE < 2, "4-bit formats have no more rows")
    acc_a = tl.zeros((P, M) if SWAP else (M, P), dtype=tl.float32)
    acc_b = acc_a
    more_a = tl.zeros((P, MORE), dtype=tl.float32) if MORE > 0 else acc_a
    more_b = more_a
    at_M, at_more = at_M.to(tl.int64), at_more.to(tl.int64)
    row = e * OUT + out.to(tl.int64)
    words = held_words(table_ptr, kind, CODE, PERMUTE)
    if CODE < 2:
        PART: tl.constexpr = (IN + R * SPLITS - 1) // (R * SPLITS) * R
        from_ = split * PART
        col = from_ + tl.arange(0, R)
        at_x = x_ptr + at_M[:, None] * IN + col[None, :]
        at_x_more = x_ptr + at_more[:, None] * IN + col[None, :]
        at_a = a_ptr + row[:, None] * IN + col[None, :]
        at_b = b_ptr + row[:, None] * IN + col[None, :]
        for start in range(from_, tl.minimum(from_ + PART, IN), R):
            left = (col < IN - start + from_)[None, :]
            x = _inputs(at_x, held_M, left, IN % R == 0)
            x_more = _inputs(at_x_more, held_more, left, IN % R == 0) if MORE > 0 else x
            a = tl.load(at_a) if IN % R == 0 else tl.load(at_a, mask=left, other=0.0)
            if CODE >= 0:
                a = byte_numbers(a, words, kind, CODE == 1, PERMUTE)
            acc_a, more_a = _multiply_all(x, x_more, a, acc_a, more_a, MORE, SWAP, PERMUTE)
            if TWO:
                b = tl.load(at_b) if IN % R == 0 else tl.load(at_b, mask=left, other=0.0)
                if CODE >= 0:
                    b = byte_numbers(b, words, kind, CODE == 1, PERMUTE)
                acc_b, more_b = _multiply_all(x, x_more, b, acc_b, more_b, MORE, SWAP, PERMUTE)
                at_b += R
            at_x += R
            at_x_more += R
            at_a += R
        if CODE >= 0:
            acc_a, more_a = _scaled(acc_a, more_a, tl.load(a_scale_ptr + row), MORE, SWAP)
            if TWO:
                acc_b, more_b = _scaled(acc_b, more_b, tl.load(b_scale_ptr + row), MORE, SWAP)
    else:
        G: tl.constexpr = IN // GROUP
        GROUPS: tl.constexpr = (G + UNROLL * SPLITS - 1) // (UNROLL * SPLITS) * UNROLL
        from_ = split * GROUPS
        HALF: tl.constexpr = GROUP // 2
        pair = tl.arange(0, HALF)
        first_a = a_ptr + row[:, None] * (IN // 2)
        first_b = b_ptr + row[:, None] * (IN // 2)
        ahead = tl.minimum(from_, G - 1)  # the last split may have no group
        a_scale, a_zero = _group_terms(
            a_scale_ptr, a_zero_ptr, a_offset_ptr, table_ptr, row, ahead, kind, G, CODE, STEPS, NESTED, PERMUTE
        )
        b_scale, b_zero = a_scale, a_zero
        if TWO:
            b_scale, b_zero = _group_terms(
                b_scale_ptr, b_zero_ptr, b_offset_ptr, table_ptr, row, ahead, kind, G, CODE, STEPS, NESTED, PERMUTE
            )
        for start in range(from_, tl.minimum(from_ + GROUPS, G), UNROLL):
            for u in tl.static_range(UNROLL):
                group = start + u
                after = tl.minimum(group + 1, G - 1)  # its scales are loaded while this group is multiplied
                even, odd = _even_and_odd(x_ptr, at_M, held_M, group * HALF + pair, IN)
                a = tl.load(first_a + (group * HALF + pair)[None, :])
                total = acc_a
                if CODE == 2:  # the tensor cores put the sums where the products are
                    ones = nibble_ones(a, kind, PERMUTE)
                    total = _multiply(even, ones, tl.zeros_like(acc_a), SWAP, PERMUTE)
                    total = _multiply(odd, ones, total, SWAP, PERMUTE)
                scale, zero = a_scale, a_zero
                a_scale, a_zero = _group_terms(
                    a_scale_ptr, a_zero_ptr, a_offset_ptr, table_ptr, row, after, kind, G, CODE, STEPS, NESTED, PERMUTE
                )
                acc_a = _add_group(acc_a, even, odd, total, a, words, scale, zero, table_ptr, SWAP, CODE, PERMUTE)
                if TWO:
                    b = tl.load(first_b + (group * HALF + pair)[None, :])
                    scale, zero = b_scale, b_zero
                    b_scale, b_zero = _group_terms(
                        b_scale_ptr, b_zero_ptr, b_offset_ptr, table_ptr, row, after,
                        kind, G, CODE, STEPS, NESTED, PERMUTE,
                    )  # fmt: skip
                    acc_b = _add_group(acc_b, even, odd, total, b, words, scale, zero, table_ptr, SWAP, CODE, PERMUTE)
    if not TWO:
        acc_b, more_b = acc_a, more_a
    if SWAP:
        return tl.trans(acc_a), tl.trans(acc_b), tl.trans(more_a), tl.trans(more_b)
    else:
        return acc_a, acc_b, more_a, more_b
