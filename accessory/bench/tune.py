"""`accessory tune`: times every tile that a kernel could take on the card at hand, and keeps the quickest.

A kernel family says which tiles it could take, and how to run with one. To add a family, add a line to `FAMILIES`.

Legend: N rows sorted by expert, E experts, O out, I in features.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accessory.bench.card import free, seconds_in_turn
from accessory.config import ModelArgs
from accessory.formats import GROUP, Format
from accessory.limits import FEW_ROWS, TILED_PAIRS
from accessory.ops.dense_products import sort_by_expert
from accessory.ops.tiles import Key, Tile, kind_of

log = logging.getLogger(__name__)

DENSE = "none"
ROWS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)  # an expert
INPUTS, CALLS = 4, 16
FINALISTS = 6  # tiles
SLOW = 5  # times the present tile's seconds, beyond which a tile is tried once only
LAUNCH = 1e-3  # seconds that a single launch may take by itself


class Problem(NamedTuple):
    """A product to run with several tiles: rows of the inputs, sorted by expert, times their expert's weight."""

    format: str
    weight: Any  # (E, O, I), a tensor or `Packed`
    other: Any  # a second one, where a kernel multiplies by two
    inputs: Sequence[tuple[Tensor, Tensor]]  # x_NI, count_E


class Family(NamedTuple):
    """Kernels that share a table of tiles.

    candidates: the tiles for a format and a weight's (O, I). run: a product of `Problem.inputs` with a tile, or with
    the one that the kernel takes by itself. weights: those that it multiplies by: "w1" (w3 has its shape), "w2", or
    attention's "wqkv" and "wo", which are no stacks.
    most: rows an expert, beyond which these kernels are not used.
    """

    name: str
    formats: Sequence[str]
    candidates: Callable[[str, int, int], list[Tile]]
    run: Callable[[Problem, Tensor, Tensor, Tile | None], Tensor]
    weights: Sequence[str] = ("w1", "w2")
    most: float = float("inf")

    @property
    def alone(self) -> bool:
        return "wo" in self.weights


class Timed(NamedTuple):
    key: Key
    tile: Tile
    us: float
    now: float  # µs with the tile that the kernel takes by itself
    tried: int  # tiles
    refused: int  # of them, those that the card has no room for


# --------------------------------------------------------------------------- families


def _grouped_tiles(format: str, out_features: int, in_features: int) -> list[Tile]:
    from accessory.ops.triton.grouped import tile_of

    # Few rows: weights are read as wide as possible, also as the tensor cores' left operand (SWAP).
    narrow = itertools.product((16, 32), ((32, 256), (64, 128), (64, 256), (128, 64), (128, 128)), (False, True))
    sizes = [(M, P, R, 1, swap, 4, 4) for M, (P, R), swap in narrow]
    wide = itertools.product((64, 128), ((64, 128), (128, 64), (256, 64)), (1, 8), ((4, 4), (8, 3)))
    sizes += [(M, P, R, side, False, warps, stages) for M, (P, R), side, (warps, stages) in wide]
    return [tile_of(size, out_features, in_features) for size in sizes]


def _grouped(problem: Problem, x_NI: Tensor, count_E: Tensor, tile: Tile | None) -> Tensor:
    from accessory.ops.triton.grouped import product

    return product(x_NI, problem.weight, count_E, tile=tile)


def _packed(problem: Problem, x_NI: Tensor, count_E: Tensor, tile: Tile | None) -> Tensor:
    from accessory.ops.triton.packed_grouped import product

    return product(x_NI, problem.weight, count_E, tile=tile)


def _expert_tiles(format: str, out_features: int, in_features: int, splits: Sequence[int] = (1,)) -> list[Tile]:
    """Few rows: the weight is the tensor cores' left operand (SWAP), of which a warp takes 16 rows. With more rows, 64
    of four warps."""
    from accessory.ops.triton.grouped_experts import NAMES

    nibble = format in GROUP
    unrolls = [u for u in (1, 2, 4) if nibble and in_features // GROUP[format] % u == 0]
    few = [(M, P, warps, True) for M in (8, 16, 32) for P, warps in ((16, 1), (32, 2), (64, 4))]
    some = [(M, P, warps, False) for M in (16, 32) for P, warps in ((32, 2), (64, 4), (128, 8))]
    many = [(M, P, warps, swap) for M in (64, 128) for P, warps in ((64, 4), (128, 8)) for swap in (True, False)]
    if len(splits) > 1:  # a single weight, whose sums fit the registers
        many.append((128, 256, 8, False))
    sizes: list[tuple[Any, ...]] = []
    for M, P, warps, swap in few + some + many:
        if nibble:
            inner = [(0, unroll, stages) for unroll, stages in ((1, 3), (1, 4), (2, 3), (4, 3)) if unroll in unrolls]
        else:
            inner = [(R, 1, stages) for R, stages in ((64, 4), (128, 3), (128, 4), (256, 3))]
        for R, unroll, stages in inner:
            # Parts of a sum are written and read again, which does not pay for many rows.
            sizes += [(M, P, R, unroll, swap, s, warps, stages) for s in splits if s == 1 or s * M <= 32]
    if not nibble:  # a few more rows than a power of two
        shapes = [(64, 4), (128, 8), *([(128, 4)] if len(splits) > 1 else [])]
        inner = [(64, 1, 3), (64, 1, 4), (128, 1, 3)]
        heights = [(64, 16), (64, 32), (128, 16), (128, 32)]
        for (M, more), (P, warps), (R, unroll, stages) in itertools.product(heights, shapes, inner):
            sizes.append((M, P, R, unroll, True, 1, warps, stages, more))
    return [dict(zip(NAMES, (*size, 0), strict=False)) for size in sizes]


def _order(x_NI: Tensor) -> Tensor:
    return torch.arange(len(x_NI), dtype=torch.int32, device=x_NI.device)


def _up(problem: Problem, x_NI: Tensor, count_E: Tensor, tile: Tile | None) -> Tensor:
    from accessory.ops.triton.grouped_experts import up

    return up(x_NI, problem.weight, problem.other, count_E, _order(x_NI), 1, tile)


def _down(problem: Problem, x_NI: Tensor, count_E: Tensor, tile: Tile | None) -> Tensor:
    from accessory.ops.triton.grouped_experts import down

    return down(x_NI, problem.weight, count_E, _order(x_NI), tile)


def _linear(problem: Problem, x_NI: Tensor, count_E: Tensor, tile: Tile | None) -> Tensor:
    from accessory.ops.triton.grouped_experts import linear

    return linear(x_NI, problem.weight, tile)


FEW = TILED_PAIRS / 8  # rows an expert
QUANTIZED = ("int8", "fp8", "int4", "nf4", "nf4-dq")
FAMILIES = (
    Family("experts_up", (DENSE, *QUANTIZED), _expert_tiles, _up, ("w1",), FEW),
    Family("experts_down", (DENSE, *QUANTIZED), partial(_expert_tiles, splits=(1, 2, 4)), _down, ("w2",), FEW),
    Family("linear", QUANTIZED, _expert_tiles, _linear, ("wqkv", "wo"), FEW_ROWS),
    Family("grouped", (DENSE,), _grouped_tiles, _grouped),
    Family("packed_grouped", QUANTIZED, _grouped_tiles, _packed),
)


# --------------------------------------------------------------------------- compiling


class Compiling(NamedTuple):
    """A tile to compile a kernel for, and the product that does: of a weight (E, O, I)."""

    run: Callable[[Problem, Tensor, Tensor, Tile | None], Tensor]
    format: str
    shape: tuple[int, int, int]
    alone: bool  # no stack
    tile: Tile


def to_compile(
    args: ModelArgs, formats: Sequence[str], rows: Sequence[float], families: Sequence[Family] = FAMILIES
) -> list[Compiling]:
    """Every tile that `tune` times."""
    found = []
    for family, format in itertools.product(families, formats):
        experts, counts = _experts(args, family)[0], _rows(family, rows)
        for O, I in _shapes(args, family) if format in family.formats else ():  # noqa: E741
            tiles = [tile for tile in _tiles(family, format, O, I) if any(suits(tile, many) for many in counts)]
            found += [Compiling(family.run, format, (experts, O, I), family.alone, tile) for tile in tiles]
    return found


def compile_ahead(
    compiling: Sequence[Compiling], device: torch.device, processes: int
) -> Iterator[tuple[int, list[Compiling]]]:
    """Compile kernels in so many processes, into the cache that they share with this one. Yields how many a part had,
    and which of them cannot run.

    A kernel takes a second or more of a core, and is timed in milliseconds.
    """
    from multiprocessing import get_context

    size = max(1, min(16, len(compiling) // (4 * processes)))
    alike = sorted(compiling, key=lambda c: (c.format, c.shape))  # a process makes few weights
    parts = [(alike[first : first + size], device) for first in range(0, len(alike), size)]
    with get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(_compile, parts)


def _compile(part: tuple[Sequence[Compiling], torch.device]) -> tuple[int, list[Compiling]]:
    """In a process of its own: run each product of one row and of a few. Kernels for more rows are the same."""
    compiling, device = part
    weight: Any = None
    refused = []
    for n, (run, format, shape, alone, tile) in enumerate(compiling):
        if weight is None or (format, shape) != (compiling[n - 1].format, compiling[n - 1].shape):
            weight = None  # before the next one is made
            weight = _weight(format, *shape, device)
            weight = weight[0] if alone else weight
            inputs = [_input(shape[0], 1, many, shape[2], device, 0) for many in (1 / shape[0], 2)]
        try:
            with torch.inference_mode():
                for x_NI, count_E in inputs:
                    run(Problem(format, weight, weight, inputs), x_NI, count_E, tile)
        except torch.OutOfMemoryError:  # beside other processes; alone it may run
            log.debug("%s %s: no memory", format, tile)
        except Exception as error:
            log.debug("%s %s: %s", format, tile, error)
            refused.append(compiling[n])
    return len(compiling), refused


# --------------------------------------------------------------------------- timing


def tune(
    args: ModelArgs,
    formats: Sequence[str],
    device: torch.device,
    *,
    rows: Sequence[float] = ROWS,
    families: Sequence[Family] = FAMILIES,
    refused: Sequence[Compiling] = (),
    begin: Callable[[str], None] = lambda name: None,
) -> Iterator[Timed]:
    """The quickest tile for each family, format, shape and number of rows an expert. refused: what cannot run."""
    for family, format in itertools.product(families, formats):
        if format in family.formats:
            for O, I in _shapes(args, family):  # noqa: E741
                yield from _tune(args, family, format, O, I, device, rows, refused, begin)


def _shapes(args: ModelArgs, family: Family) -> tuple[tuple[int, int], ...]:
    """(O, I) of the weights that a family multiplies by. Their kinds differ (`tiles.kind_of`)."""
    heads = args.n_heads * args.head_dim
    shapes = {"w1": (args.hidden_dim, args.dim), "w2": (args.dim, args.hidden_dim)}
    shapes |= {"wqkv": (heads + 2 * args.n_kv_heads * args.head_dim, args.dim), "wo": (args.dim, heads)}
    return tuple(shapes[name] for name in family.weights)


def _tune(
    args: ModelArgs, family: Family, format: str, O: int, I: int, device: torch.device,  # noqa: E741
    rows: Sequence[float], refused: Sequence[Compiling], begin: Callable[[str], None],
) -> Iterator[Timed]:  # fmt: skip
    experts, chosen = _experts(args, family)
    weight, other = (_weight(format, experts, O, I, device) for _ in range(2))
    weight, other = (weight[0], other[0]) if family.alone else (weight, other)
    what = (family.run, format, (experts, O, I), family.alone)
    tiles = [tile for tile in _tiles(family, format, O, I) if (*what, tile) not in refused]
    for many in _rows(family, rows):
        key = Key(family.name, format, kind_of(O, I), many)
        begin(f"{family.name} {format}, {key.kind}, {many} rows an expert")
        inputs = [_input(experts, chosen, many, I, device, n) for n in range(INPUTS)]
        problem = Problem(format, weight, other, inputs)
        yield best(key, family, problem, [tile for tile in tiles if suits(tile, many)], device)
    del weight, other
    free(device)


def _experts(args: ModelArgs, family: Family) -> tuple[int, int]:
    """How many experts a family's weight has, and of them a token takes."""
    return (1, 1) if family.alone else (args.moe.num_experts, args.moe.num_experts_per_tok)


def _tiles(family: Family, format: str, O: int, I: int) -> list[Tile]:  # noqa: E741
    """The tiles for a weight, each once."""
    return [dict(items) for items in dict.fromkeys(tuple(t.items()) for t in family.candidates(format, O, I))]


def _rows(family: Family, rows: Sequence[float]) -> list[float]:
    return [many for many in rows if many <= family.most and (many >= 1 or not family.alone)]


def count(formats: Sequence[str], rows: Sequence[float], families: Sequence[Family] = FAMILIES) -> int:
    """How many products `tune` times."""
    each = {family.name: len(family.weights) * len(_rows(family, rows)) for family in families}
    return sum(each[family.name] for family in families for format in formats if format in family.formats)


def suits(tile: Tile, rows: float) -> bool:
    """Whether a tile's rows are near enough to an expert's rows for the tile to be worth trying."""
    return rows / 16 <= tile.get("M", rows) <= max(32, 4 * rows)


def best(key: Key, family: Family, problem: Problem, tiles: Sequence[Tile], device: torch.device) -> Timed:
    """The quickest of the tiles: each is timed a few times, and the quickest of them again.

    RuntimeError where none can run.
    """

    def seconds(tile: Tile | None, calls: int = CALLS, rounds: int = 9, **how: Any) -> float:
        ways = [partial(family.run, problem, x_NI, count_E, tile) for x_NI, count_E in problem.inputs[:calls]]
        with torch.inference_mode():
            return seconds_in_turn(ways, device, calls, rounds=rounds, **how)

    now = seconds(None)
    times: list[tuple[float, int]] = []
    why: Exception | None = None
    for n, tile in enumerate(tiles):
        try:
            if seconds(tile, 1, 1, graph=False) < SLOW * now + LAUNCH:
                times.append((seconds(tile, INPUTS, 3), n))
        except Exception as error:  # a tile may need more shared memory than the card has
            why = error
    if not times:
        raise RuntimeError(f"{key}: no tile can run on this card") from why
    least, n = min((seconds(tiles[n]), n) for _, n in sorted(times)[:FINALISTS])
    return Timed(key, tiles[n], least * 1e6, now * 1e6, len(tiles), len(tiles) - len(times))


def _weight(format: str, E: int, O: int, I: int, device: torch.device) -> Any:  # noqa: E741
    """A stack of copies of one weight, since quantising takes several times the memory of what it quantises."""
    from accessory.ops.quantized import quantize

    def copied(t: Tensor) -> Tensor:
        return t.expand(E, *t.shape[1:]).contiguous()

    dense = torch.empty(1, O, I, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
    if format == DENSE:
        return copied(dense)
    chosen: Format = format  # type: ignore[assignment]
    return quantize(dense, chosen).map(copied)


def _input(
    experts: int, chosen: int, rows: float, I: int, device: torch.device, seed: int  # noqa: E741
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A random routing in which an expert gets so many rows on average, at least those of one token in all."""
    draw = torch.Generator(device).manual_seed(seed)
    tokens = max(1, round(rows * experts / chosen))
    expert_TK = torch.rand(tokens, experts, device=device, generator=draw).topk(chosen)[1]
    x_NI = torch.randn(tokens * chosen, I, device=device, generator=draw).to(torch.bfloat16)
    return x_NI, sort_by_expert(expert_TK, experts)[1]
