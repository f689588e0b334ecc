"""Tiles that were measured on a card. `accessory tune` writes the tables, and kernels ask here before their defaults.

A table is a file `tiles-<card>.json`. What the file of a card's whole name ("h100-80gb-hbm3") says wins over one of its
beginning ("h100"). Tables are those of the variable ACCESSORY_TILES, a file or folder, then those in the user's cache,
then those that the package brings: a later one counts for what no earlier one has measured. Only the standard library
is imported here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from accessory.errors import ConfigError

VARIABLE = "ACCESSORY_TILES"
SHIPPED = Path(__file__).with_name("tiles")
Tile = dict[str, Any]


class Key(NamedTuple):
    """What a tile was measured for. kind: the weight's shape, see `kind_of`. rows: at most so many an expert."""

    family: str
    format: str
    kind: str
    rows: float


def kind_of(out_features: int, in_features: int) -> str:
    return "square" if out_features == in_features else "up" if out_features > in_features else "down"


def slug(card: str) -> str:
    """A card's name as in the name of a file: "h100-80gb-hbm3" of "NVIDIA H100 80GB HBM3"."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower().removeprefix("nvidia ").removeprefix("amd ")).strip("-")


def file_name(card: str) -> str:
    return f"tiles-{slug(card)}.json"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accessory" / "tiles"


@lru_cache(maxsize=4096)
def measured(
    card: str, family: str, format: str, out_features: int, in_features: int, rows: float
) -> tuple[tuple[str, Any], ...] | None:
    """The items of the tile for so many rows an expert; None where this card was not measured for as many.

    ConfigError for a table that is none.
    """
    kind, table = kind_of(out_features, in_features), table_of(card)
    fitting = [key for key in table if key[:3] == (family, format, kind) and rows <= key.rows]
    return tuple(table[min(fitting, key=lambda key: key.rows)].items()) if fitting else None


@cache
def table_of(card: str) -> dict[Key, Tile]:
    """The measured tiles of a card, from all tables that have any; empty where nobody measured it."""
    table: dict[Key, Tile] = {}
    for path in reversed(list(_files(slug(card)))):
        table |= read(path)
    return table


def _files(name: str) -> Iterator[Path]:
    """The tables that may be this card's, the best first."""
    given = os.environ.get(VARIABLE)
    if given and not Path(given).exists():
        raise ConfigError(f"{VARIABLE}: got {given!r}, but there is no such file or folder")
    if given and Path(given).is_file():
        yield Path(given)
    words = name.split("-")
    for folder in (*([Path(given)] if given and Path(given).is_dir() else []), cache_folder(), SHIPPED):
        for count in range(len(words), 0, -1):
            path = folder / f"tiles-{'-'.join(words[:count])}.json"
            if path.is_file():
                yield path


def read(path: Path) -> dict[Key, Tile]:
    """ConfigError where the file is no table of tiles."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["tiles"]
        return {Key(*(row[name] for name in Key._fields)): dict(row["tile"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a table of tiles ({error!r:.60}); make it again with accessory tune") from error


def as_json(card: str, rows: Iterable[tuple[Key, Tile, float]], **about: Any) -> dict[str, Any]:
    """A table for a file. rows: (key, tile, µs)."""
    tiles = [{**key._asdict(), "tile": tile, "us": round(us, 2)} for key, tile, us in rows]
    return {"card": card, **about, "tiles": tiles}
