"""The experts' feed-forward for up to 512 tokens, in weights of any format, and a single quantised weight for as many.

Four kernels do all of it: one sorts the (token, expert) pairs by expert; one multiplies by w1 and w3 and applies SiLU;
one multiplies by w2; one sums each token's experts. One token needs no order. Nothing is padded and nothing copied: the
first product gathers its rows, the second scatters its own to their pairs. Each weight is read and unpacked once if no
expert has more rows than a tile. The host never learns which experts were chosen, so a CUDA graph can record the whole
step. No sum depends on the order in which programs run.

Legend: T tokens, K experts a token, N = T·K pairs, E experts of this rank (numbers from `first`), D dim, F hidden dim.
A tile has M + MORE rows of x and P rows of the weight.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.formats import GROUP
from accessory.limits import TILED_PAIRS
from accessory.ops.dense_products import sort_by_expert
from accessory.ops.linear import Weight
from accessory.ops.quantized import Packed
from accessory.ops.triton.card import cdiv, measured_on, on_its_card, shared_bytes
from accessory.ops.triton.grouped import grid, place, slots
from accessory.ops.triton.nibbles import permutes
from accessory.ops.triton.overlap import let_next_begin, overlap, wait_for_inputs
from accessory.ops.triton.packed import constants, pointers
from accessory.ops.triton.tile_dot import DENSE, tile_dot


@triton.jit
def _sort_kernel(
    expert_ptr, order_ptr, count_ptr, N, first, E: tl.constexpr, SLOTS: tl.constexpr, PAIRS: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):  # fmt: skip
    """order_N: the pairs by expert, ascending within one; those of other ranks' experts come nowhere. count_E."""
    let_next_begin(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    n = tl.arange(0, PAIRS)
    e = tl.arange(0, SLOTS)
    local = tl.load(expert_ptr + n, mask=n < N, other=-1).to(tl.int32) - first
    mine = ((local[:, None] == e[None, :]) & (n < N)[:, None] & (e < E)[None, :]).to(tl.int32)
    count = tl.sum(mine, 0)
    place = (tl.cumsum(count, 0) - count)[None, :] + tl.cumsum(mine, 0) - 1
    tl.store(order_ptr + tl.sum(place * mine, 1), n, mask=tl.sum(mine, 1) > 0)
    tl.store(count_ptr + e, count, mask=e < E)


@triton.jit
def _place(
    count_ptr, N, number, KEEPS: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr, COUNTED: tl.constexpr,
    ONE: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`grouped.place`. ONE token needs no order: its pairs are the tiles, and their experts come in place of counts."""
    if ONE:
        pair = tl.program_id(0) % N
        e = tl.load(count_ptr + pair).to(tl.int32) - number
        return tl.program_id(0) // N, tl.where((e >= 0) & (e < E), e, E), pair, pair + 1
    else:
        return place(count_ptr, N, KEEPS, E, SLOTS, COUNTED, M, P, 1)


@triton.jit
def _rows(first, end, ROWS: tl.constexpr):
    """(row, held): the next ROWS of an expert's rows, and which of them it has."""
    row = first + tl.arange(0, ROWS)
    return row, row < end


@triton.jit
def _source(order_ptr, row, held, ORDERED: tl.constexpr):
    """The pairs of sorted rows."""
    return tl.load(order_ptr + row, mask=held, other=0) if ORDERED else row


@triton.jit
def _write(y_ptr, y, row, held, col, OUT: tl.constexpr):
    """A tile y to the held ones of its rows."""
    at = y_ptr + row[:, None].to(tl.int64) * OUT + col[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=held[:, None] & (col < OUT)[None, :])


@triton.jit(do_not_specialize=["N", "number"])  # one kernel for every number of pairs, on every rank
def _up_kernel(
    x_ptr, d1_ptr, s1_ptr, z1_ptr, o1_ptr, d3_ptr, s3_ptr, z3_ptr, o3_ptr, table_ptr, count_ptr, order_ptr, h_ptr,
    N, number, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr,
    ONE: tl.constexpr, M: tl.constexpr, MORE: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    UNROLL: tl.constexpr, SWAP: tl.constexpr, SPLITS: tl.constexpr,
    CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr, NESTED: tl.constexpr, PERMUTE: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):  # fmt: skip
    """h_NF = silu(x w1ᵀ) ⊙ (x w3ᵀ) of the sorted pairs."""
    wait_for_inputs(OVERLAPS)
    block, e, first, end = _place(count_ptr, N, number, F, E, SLOTS, True, ONE, M + MORE, P)
    if e < E:
        unit = block * P + tl.arange(0, P)
        row, held = _rows(first, end, M)
        row_more, held_more = _rows(first + M, end, MORE if MORE > 0 else M)
        token = _source(order_ptr, row, held, not ONE) // K
        token_more = _source(order_ptr, row_more, held_more, not ONE) // K
        gate, up, gate_more, up_more = tile_dot(
            x_ptr, token, held, token_more, held_more,
            d1_ptr, s1_ptr, z1_ptr, o1_ptr, d3_ptr, s3_ptr, z3_ptr, o3_ptr, table_ptr,
            e, tl.minimum(unit, F - 1), 0,
            F, D, M, MORE, P, R, UNROLL, SWAP, SPLITS, True, CODE, GROUP, STEPS, NESTED, PERMUTE,
        )  # fmt: skip
        let_next_begin(OVERLAPS)
        _write(h_ptr, gate / (1.0 + tl.exp(-gate)) * up, row, held, unit, F)
        if MORE > 0:
            _write(h_ptr, gate_more / (1.0 + tl.exp(-gate_more)) * up_more, row_more, held_more, unit, F)


@triton.jit(do_not_specialize=["N", "number"])
def _rows_kernel(
    x_ptr, d_ptr, s_ptr, z_ptr, o_ptr, table_ptr, count_ptr, order_ptr, y_ptr, N, number,
    OUT: tl.constexpr, IN: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr, COUNTED: tl.constexpr,
    ONE: tl.constexpr, M: tl.constexpr, MORE: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    UNROLL: tl.constexpr, SWAP: tl.constexpr, SPLITS: tl.constexpr,
    CODE: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr, NESTED: tl.constexpr, PERMUTE: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):  # fmt: skip
    """y_SNO: part s of SPLITS of x_NI Wᵀ. COUNTED: W is that of each row's expert, and row n goes to pair order[n]."""
    wait_for_inputs(OVERLAPS)
    split = tl.program_id(1)
    block, e, first, end = _place(count_ptr, N, number, OUT, E, SLOTS, COUNTED, ONE, M + MORE, P)
    if e < E:
        out = block * P + tl.arange(0, P)
        row, held = _rows(first, end, M)
        row_more, held_more = _rows(first + M, end, MORE if MORE > 0 else M)
        y, _, y_more, _ = tile_dot(
            x_ptr, row, held, row_more, held_more, d_ptr, s_ptr, z_ptr, o_ptr, d_ptr, s_ptr, z_ptr, o_ptr, table_ptr,
            e, tl.minimum(out, OUT - 1), split,
            OUT, IN, M, MORE, P, R, UNROLL, SWAP, SPLITS, False, CODE, GROUP, STEPS, NESTED, PERMUTE,
        )  # fmt: skip
        let_next_begin(OVERLAPS)
        _write(y_ptr, y, split * N + _source(order_ptr, row, held, COUNTED and not ONE), held, out, OUT)
        if MORE > 0:
            to = _source(order_ptr, row_more, held_more, COUNTED and not ONE)
            _write(y_ptr, y_more, split * N + to, held_more, out, OUT)


@triton.jit(do_not_specialize=["N"])
def _combine_kernel(
    part_ptr, weight_ptr, expert_ptr, y_ptr, N, first, experts,
    D: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, COLS: tl.constexpr, OVERLAPS: tl.constexpr = False,
):  # fmt: skip
    """y_TD = Σ_k weight · Σ_s part_SND of one token's pairs, always in one order. Other ranks' experts add nothing."""
    let_next_begin(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    y = tl.zeros((COLS,), dtype=tl.float32)
    for k in tl.static_range(K):
        e = tl.load(expert_ptr + token * K + k) - first
        mine = (e >= 0) & (e < experts)
        part = tl.zeros((COLS,), dtype=tl.float32)
        for s in tl.static_range(SPLITS):
            part += tl.load(part_ptr + (s * N + token * K + k) * D + col, mask=(col < D) & mine, other=0.0)
        y += tl.where(mine, tl.load(weight_ptr + token * K + k), 0.0) * part
    tl.store(y_ptr + token * D + col, y, mask=col < D)


NAMES = ("M", "P", "R", "UNROLL", "SWAP", "SPLITS", "num_warps", "num_stages", "MORE")
# Tiles by kind of number and by the most rows an expert, as in NAMES, for w1 with w3, for w2, and for a weight alone:
# the best of 60 to 140 on an H200 at Mixtral-8x7B's sizes, found by `accessory tune`. Few rows are the right operand of
# the tensor cores (SWAP), which multiply 16 rows of the weight by 8 rows of x at once. Where a line ends before MORE,
# that is 0.
UP: dict[str, dict[float, tuple[Any, ...]]] = {
    "dense": {2: (8, 64, 256, 1, True, 1, 4, 3), 4: (16, 32, 128, 1, True, 1, 2, 4),
              8: (16, 32, 128, 1, False, 1, 2, 4), 16: (32, 128, 128, 1, False, 1, 8, 3),
              32: (64, 128, 64, 1, False, 1, 8, 4), inf: (128, 128, 64, 1, False, 1, 8, 4)},
    "byte": {0.25: (8, 32, 128, 1, True, 1, 2, 3), 4: (8, 64, 256, 1, True, 1, 4, 3),
             8: (16, 64, 256, 1, False, 1, 4, 3), 32: (32, 64, 128, 1, False, 1, 4, 3),
             48: (64, 64, 64, 1, False, 1, 4, 4), 64: (64, 64, 64, 1, True, 1, 4, 3, 16),
             80: (64, 64, 128, 1, True, 1, 4, 3, 32), 112: (128, 64, 64, 1, False, 1, 4, 4),
             inf: (128, 64, 64, 1, True, 1, 4, 3, 32)},
    "nibble": {0.25: (8, 32, 0, 2, True, 1, 2, 3), 4: (8, 64, 0, 2, True, 1, 4, 3), 16: (16, 32, 0, 1, True, 1, 2, 4),
               inf: (32, 64, 0, 1, False, 1, 4, 3)},
}  # fmt: skip
DOWN: dict[str, dict[float, tuple[Any, ...]]] = {
    "dense": {1: (16, 64, 128, 1, True, 2, 4, 3), 2: (16, 128, 128, 1, False, 1, 8, 3),
              8: (16, 128, 128, 1, False, 1, 8, 4), 16: (32, 128, 128, 1, False, 1, 8, 3),
              32: (64, 128, 128, 1, False, 1, 8, 4), 64: (64, 128, 64, 1, True, 1, 4, 4, 16),
              inf: (128, 256, 64, 1, False, 1, 8, 4)},
    "byte": {1: (8, 64, 128, 1, True, 4, 4, 4), 2: (8, 64, 256, 1, True, 4, 4, 3), 8: (16, 128, 256, 1, False, 1, 8, 3),
             16: (16, 64, 256, 1, False, 2, 4, 3), 24: (32, 128, 256, 1, False, 1, 8, 3),
             32: (64, 128, 128, 1, True, 1, 8, 4),
             64: (64, 128, 128, 1, True, 1, 4, 3, 16), 112: (128, 128, 64, 1, False, 1, 4, 4),
             inf: (128, 128, 64, 1, True, 1, 4, 3, 32)},
    "nibble": {0.25: (8, 32, 0, 4, True, 4, 2, 3), 4: (8, 64, 0, 4, True, 4, 4, 3), 16: (16, 64, 0, 2, False, 2, 4, 3),
               inf: (32, 64, 0, 4, False, 1, 4, 3)},
}  # fmt: skip
ALONE: dict[str, dict[float, tuple[Any, ...]]] = {  # those of dense weights have not been measured
    "dense": {16: (16, 32, 128, 1, False, 1, 4, 4), inf: (32, 32, 128, 1, False, 1, 4, 4)},
    "byte": {4: (8, 64, 128, 1, True, 1, 4, 3), 8: (8, 32, 256, 1, True, 1, 2, 3), 16: (16, 32, 128, 1, True, 1, 2, 3),
             32: (32, 64, 128, 1, False, 1, 4, 3), inf: (64, 64, 256, 1, False, 1, 4, 3)},
    "nibble": {8: (8, 16, 0, 4, True, 1, 1, 3), 16: (16, 32, 0, 4, True, 1, 2, 3), 32: (16, 32, 0, 2, True, 1, 2, 3),
               inf: (32, 64, 0, 4, False, 1, 4, 3)},
}  # fmt: skip
_KIND = {"none": "dense", "int8": "byte", "fp8": "byte", "int4": "nibble", "nf4": "nibble", "nf4-dq": "nibble"}


def _tile(
    tables: dict[str, dict[float, tuple[Any, ...]]], weight: Tensor | Packed, rows: float, shared: int | None = None
) -> dict[str, Any]:
    """The tile for a weight and so many rows of each expert, not larger than the weight itself.

    What `accessory tune` measured on the weight's card comes before the tables above. shared: bytes of shared memory
    that a program may have, by default those of the card. Where they are few, the tile has fewer stages: these hold
    numbers that are loaded ahead.
    """
    *_, O, I = weight.shape  # noqa: E741
    data, format = (weight.data, weight.format) if isinstance(weight, Packed) else (weight, "none")
    family = "experts_up" if tables is UP else "experts_down" if tables is DOWN else "linear"
    found = measured_on(data.device, family, format, O, I, rows)
    sizes = next(sizes for most, sizes in tables[_KIND[format]].items() if rows <= most)
    tile = {"MORE": 0, **(found or dict(zip(NAMES, sizes, strict=False)))}
    tile["P"] = min(tile["P"], max(16, triton.next_power_of_2(O)))
    tile["R"] = numbers = min(tile["R"], max(16, triton.next_power_of_2(I)))
    if format in GROUP:
        groups = I // GROUP[format]
        tile["UNROLL"] = 1 if groups % tile["UNROLL"] else tile["UNROLL"]
        numbers = tile["UNROLL"] * GROUP[format]
    weights = (2 if tables is UP else 1) * tile["P"] * numbers * data.shape[-1] // I * data.element_size()
    stage = 2 * (tile["M"] + tile["MORE"]) * numbers + weights
    room = shared_bytes(data.device) if shared is None else shared
    tile["num_stages"] = max(2, min(tile["num_stages"], room // stage))
    return tile


def _described(weight: Tensor | Packed) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """(tensors, constants) of a weight for the kernels. A dense weight stands in for what it does not have."""
    if isinstance(weight, Packed):
        data, *others = pointers(weight)
        # As bytes, because Triton knows no fp8 numbers on Ampere.
        data = data.view(torch.uint8) if weight.format == "fp8" and permutes() else data
        return (data, *others), constants(weight)
    fixed = {"CODE": DENSE.value, "GROUP": 1, "STEPS": 1, "NESTED": 1, "PERMUTE": permutes()}
    return (weight,) * 5, fixed


@on_its_card
def sort_pairs(expert_TK: Tensor, experts: int, first: int) -> tuple[Tensor, Tensor]:
    """`dense_products.sort_by_expert` in one launch, int32, without the pairs of other ranks' experts."""
    N = expert_TK.numel()
    order_N = torch.empty(N, dtype=torch.int32, device=expert_TK.device)
    count_E = torch.empty(experts, dtype=torch.int32, device=expert_TK.device)
    pairs = max(16, triton.next_power_of_2(N))
    _sort_kernel[(1,)](
        expert_TK.contiguous(), order_N, count_E, N, first, E=experts, SLOTS=slots(experts), PAIRS=pairs, num_warps=4,
        **overlap(expert_TK),
    )  # fmt: skip
    return order_N, count_E


def _programs(N: int, E: int, keeps: int, tile: dict[str, Any], one: bool = False) -> tuple[int]:
    """`grouped.grid`; one token's pairs are N tiles, also where some are of other ranks' experts."""
    return (N * cdiv(keeps, tile["P"]),) if one else grid(N, E, keeps, {**tile, "M": tile["M"] + tile["MORE"]})


@on_its_card
def up(
    x_TD: Tensor,
    w1: Tensor | Packed,
    w3: Tensor | Packed,
    count_E: Tensor,
    order_N: Tensor | None,
    K: int,
    tile: dict[str, Any] | None = None,
    first: int = 0,
) -> Tensor:
    """h_NF of the pairs `order_N`, of which the token t has the numbers t · K … t · K + K - 1.

    Without an order there is one token; count_E holds its experts' numbers, of which this rank's begin at `first`.
    """
    (E, F, D), N = w1.shape, len(x_TD) * K if order_N is None else len(order_N)
    tile = tile or _tile(UP, w1, N / E)
    h_NF = torch.empty(N, F, dtype=x_TD.dtype, device=x_TD.device)
    (tensors1, fixed), (tensors3, _) = _described(w1), _described(w3)
    _up_kernel[_programs(N, E, F, tile, one=order_N is None)](
        x_TD, *tensors1[:4], *tensors3, count_E, count_E if order_N is None else order_N, h_NF, N, first,
        D=D, F=F, K=K, E=E, SLOTS=slots(E), ONE=order_N is None, **tile, **fixed, **overlap(x_TD),
    )  # fmt: skip
    return h_NF


@on_its_card
def down(
    h_NF: Tensor,
    w2: Tensor | Packed,
    count_E: Tensor,
    order_N: Tensor | None,
    tile: dict[str, Any] | None = None,
    first: int = 0,
) -> Tensor:
    """part_SND, fp32: w2 h of each pair, as a sum of S parts. The pairs of other ranks' experts stay uninitialised.

    Without an order: see `up`.
    """
    (E, D, F), N = w2.shape, len(h_NF)
    tile = tile or _tile(DOWN, w2, N / E)
    part_SND = torch.empty(tile["SPLITS"], N, D, dtype=torch.float32, device=h_NF.device)
    tensors, fixed = _described(w2)
    _rows_kernel[(*_programs(N, E, D, tile, one=order_N is None), tile["SPLITS"])](
        h_NF, *tensors, count_E, count_E if order_N is None else order_N, part_SND, N, first,
        OUT=D, IN=F, E=E, SLOTS=slots(E), COUNTED=True, ONE=order_N is None, **tile, **fixed,
        **overlap(h_NF, 1 if order_N is None else N),
    )  # fmt: skip
    return part_SND


@on_its_card
def experts_in_tiles(
    x_TD: Tensor,
    w1_EFD: Weight,
    w2_EDF: Weight,
    w3_EFD: Weight,
    weight_TK: Tensor,
    expert_TK: Tensor,
    first: int = 0,
    adapter_T: Tensor | None = None,
    as_rows: float | None = None,
) -> Tensor:
    """Σ_k weight · swiglu of the experts `first … first + E - 1`: (T, D) fp32. h is in x's dtype, sums are in fp32.

    Nothing may stand beside the weights, so no token has an adapter. as_rows: take the tiles for so many pairs an
    expert, by default for as many as there are.
    """
    assert adapter_T is None, "this kernel reads the weights alone"
    assert all(w.plain for w in (w1_EFD, w2_EDF, w3_EFD)), "this kernel reads the weights alone"
    w1, w2, w3 = w1_EFD.weight, w2_EDF.weight, w3_EFD.weight
    (T, D), E, K = x_TD.shape, w1.shape[0], expert_TK.shape[1]
    x_TD, weight_TK, expert_TK = x_TD.contiguous(), weight_TK.contiguous(), expert_TK.contiguous()
    one = T == 1 and as_rows is None
    if one:
        order_N, count_E = None, expert_TK
    elif expert_TK.numel() <= TILED_PAIRS:
        order_N, count_E = sort_pairs(expert_TK, E, first)
    else:  # too many for one program's registers
        order_N, count_E = (t.to(torch.int32) for t in sort_by_expert(expert_TK, E, first))
    rows = T * K / E if as_rows is None else as_rows
    h_NF = up(x_TD, w1, w3, count_E, order_N, K, _tile(UP, w1, rows), first if one else 0)
    part_SND = down(h_NF, w2, count_E, order_N, _tile(DOWN, w2, rows), first if one else 0)
    splits = len(part_SND)
    y_TD = torch.empty(T, D, dtype=torch.float32, device=x_TD.device)
    cols = min(1024, triton.next_power_of_2(D))
    _combine_kernel[(T, cdiv(D, cols))](
        part_SND, weight_TK, expert_TK, y_TD, T * K, first, E, D=D, K=K, SPLITS=splits, COLS=cols, num_warps=4,
        **overlap(x_TD),
    )  # fmt: skip
    return y_TD


@on_its_card
def linear(
    x_NI: Tensor, p: Tensor | Packed, tile: dict[str, Any] | None = None, as_rows: float | None = None
) -> Tensor:
    """x (N, I) times a quantised or dense weight (O, I): (N, O) in x's dtype.

    as_rows: take the tile for so many rows, by default for as many as there are.
    """
    x_NI = x_NI.contiguous()
    (N, I), O = x_NI.shape, p.shape[0]  # noqa: E741
    y_NO = torch.empty(N, O, dtype=x_NI.dtype, device=x_NI.device)
    tile = tile or _tile(ALONE, p, N if as_rows is None else as_rows)
    tensors, fixed = _described(p)
    _rows_kernel[_programs(N, 1, O, tile)](
        x_NI, *tensors, x_NI, x_NI, y_NO, N, 0, OUT=O, IN=I, E=1, SLOTS=2, COUNTED=False, ONE=False, **tile, **fixed,
        **overlap(x_NI),
    )  # fmt: skip
    return y_NO
