"""The files that finetuning data comes in: which there are, and their items one by one, each with its place.

`META` is a list; of each entry, `path` is a .json, .jsonl, .csv or .parquet file, `type` a name (items of one type
share batches), `ratio` the share of its items that is used, `root` what image paths begin with, `prompt_type` the
prompt of single turns.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from accessory.errors import ConfigError, InputError, MissingExtraError

_KEYS = ("path", "type", "ratio", "root", "preprocess", "prompt_type")
_READERS = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Source:
    """One file of a META list."""

    path: Path
    group: str
    ratio: float = 1.0
    root: str = ""
    prompt_type: str = "alpaca"


def read_meta(meta: str | Path | Mapping[str, Any]) -> list[Source]:
    """The files that a YAML (or its contents) names. ConfigError names the entry and key that cannot be used.

    A path is looked for from where one stands, then beside the YAML.
    """
    beside = Path()
    if isinstance(meta, str | Path):
        where, beside = str(meta), Path(meta).parent
        try:
            meta = yaml.safe_load(Path(meta).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"data_config: {where}: cannot be read ({error.strerror})") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"data_config: {where}: not valid YAML ({' '.join(str(error).split())})") from error
    else:
        where = "data_config"
    entries = meta.get("META") if isinstance(meta, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{where}: expected META, a list of files, each with path and type")
    return [_source(entry, f"{where}: META[{n}]", beside) for n, entry in enumerate(entries)]


def _source(entry: Any, where: str, beside: Path) -> Source:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: got {entry!r}, but it must have path and type")
    for key in entry:
        if key not in _KEYS:
            close = difflib.get_close_matches(str(key), _KEYS, n=1)
            raise ConfigError(
                f"{where}: unknown key {key!r}; "
                + (f"did you mean {close[0]!r}?" if close else f"known are {', '.join(_KEYS)}")
            )
    if not isinstance(entry.get("path"), str):
        raise ConfigError(f"{where}: path: missing; give a {', '.join(_READERS)} file")
    path = Path(entry["path"])
    if not path.exists() and not path.is_absolute() and (beside / path).exists():
        path = beside / path
    if not path.is_file():
        raise ConfigError(
            f"{where}: path: {entry['path']}: no such file, neither from here nor beside the configuration"
        )
    if path.suffix not in _READERS:
        raise ConfigError(f"{where}: path: {path}: cannot be read; known are {', '.join(_READERS)}")
    ratio = entry.get("ratio", 1.0)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ConfigError(f"{where}: ratio: got {ratio!r}, but it must be above 0 and at most 1")
    return Source(
        path,
        str(entry.get("type", "text")),
        float(ratio),
        str(entry.get("root") or ""),
        str(entry.get("prompt_type", "alpaca")),
    )


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, item) of each item of a file; a place reads "file:line", or "file[index]" inside one JSON list.

    What cannot be read is given as an InputError in the item's place, and reading goes on behind it.
    """
    if path.suffix == ".jsonl":
        yield from _json_lines(path)
    elif path.suffix == ".json":
        yield from _json_list(path)
    elif path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield f"{path}:{reader.line_num}", {k: v for k, v in row.items() if v not in (None, "")}
    else:
        yield from _parquet(path)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                yield place, json.loads(line)
            except ValueError as error:
                yield place, InputError(f"{place}: not valid JSON ({error})")


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        yield str(path), InputError(f"{path}{line}: not valid JSON ({error})")
        return
    if not isinstance(value, list):
        yield str(path), InputError(f"{path}: expected a list of items, found {type(value).__name__}")
        return
    for index, item in enumerate(value):
        yield f"{path}[{index}]", item


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError(
            f"{path}: reading parquet needs pyarrow: pip install 'mixtral-accessory[data]'"
        ) from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for item in batch.to_pylist():
                yield f"{path}[{number}]", {k: v for k, v in item.items() if v is not None}
                number += 1
    except (OSError, ValueError) as error:
        yield str(path), InputError(f"{path}: not a parquet file ({' '.join(str(error).split())})")
