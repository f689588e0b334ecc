"""The files that hold finetuning data: the META list that names them, and each file's items with their lines.

A file is indexed when it is opened, and memory holds where each item begins, not the items. An item is read when it is
asked for, from any thread.
"""

from __future__ import annotations

import csv
import difflib
import json
import mmap
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from accessory.data.system_prompt import SYSTEM_PROMPTS
from accessory.errors import ConfigError, InputError, MissingExtraError, listed

_BEGINNING = 1 << 20  # characters of a .json file that tell a list of data files from data
_KEYS = ("path", "type", "ratio", "root", "preprocess", "prompt_type")
PREPROCESSES = ("single_turn_llava", "caption")
ANSWERS = ("conversations", "messages", "output", "text", "caption")  # the columns that hold what a model learns
KNOWN_COLUMNS = (
    "conversations", "messages", "tools", "instruction", "input", "output", "text", "image", "url", "caption",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One file of a META list."""

    path: Path
    group: str = "text"  # its `type`: items of one type share batches
    ratio: float = 1.0  # the share of its items that is used
    root: str = ""  # what image paths begin with
    preprocess: str | None = None
    prompt_type: str | None = None  # of single turns


def read_meta(meta: str | Path | Mapping[str, Any]) -> list[Source]:
    """The files that a YAML (or its contents) names, or the data file itself.

    ConfigError names the entry and key that cannot be used. A relative path is looked for from the current folder
    first, then from the YAML's folder.
    """
    if isinstance(meta, str | Path) and is_data_file(meta):
        return [Source(Path(meta))]
    beside, where = Path(), "data_config"
    if isinstance(meta, str | Path):
        beside, where = Path(meta).parent, str(meta)
        meta = read_yaml(meta)
    entries = meta.get("META") if isinstance(meta, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{where}: expected META, a list of files, each with path and type")
    refuse_unknown(meta, ("META",), where)
    return [_source(entry, f"{where}: META[{n}]", beside) for n, entry in enumerate(entries)]


def is_data_file(path: str | Path) -> bool:
    """Whether a file holds items, and is no list of such files. The beginning of a .json file tells."""
    path = Path(path)
    if path.suffix not in _KINDS or not path.is_file():
        return False
    if path.suffix != ".json":
        return True
    with open(path, encoding="utf-8", errors="replace") as file:
        begin = file.read(_BEGINNING).lstrip("\ufeff \t\r\n")
    try:
        first, _ = json.JSONDecoder().raw_decode(begin)
    except (ValueError, RecursionError):  # longer than its beginning, or broken; else it is YAML
        return begin[:1] in "[{"
    return not (isinstance(first, Mapping) and {"META", "data_config"} & first.keys())


def read_yaml(path: str | Path) -> Any:
    """The contents of a YAML file. ConfigError where it cannot be read."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error


def listed_kinds() -> str:
    """How the names of data files end, for messages."""
    return ", ".join(_KINDS)


def _source(entry: Any, where: str, beside: Path) -> Source:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: got {entry!r}, but it must have path and type")
    refuse_unknown(entry, _KEYS, where)
    for key in ("path", "type", "root", "preprocess"):
        if not isinstance(entry.get(key, ""), str | None):
            raise ConfigError(f"{where}: {key}: got {entry[key]!r}, but it must be text")
    if not entry.get("path"):
        raise ConfigError(f"{where}: path: missing; give a {listed_kinds()} file")
    path = Path(entry["path"])
    if not path.exists() and (beside / path).exists():
        path = beside / path
    if not path.is_file():
        raise ConfigError(
            f"{where}: path: {entry['path']}: no such file, neither from {Path.cwd()} nor from {beside.absolute()}"
        )
    if path.suffix not in _KINDS:
        raise ConfigError(f"{where}: path: {path}: cannot be read; known are {listed_kinds()} files")
    ratio = 1.0 if entry.get("ratio") is None else entry["ratio"]
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ConfigError(f"{where}: ratio: got {ratio!r}, but it must be above 0 and at most 1")
    preprocess = entry.get("preprocess")
    if preprocess is not None:
        refuse_unknown([preprocess], PREPROCESSES, f"{where}: preprocess", "value")
    # YAML reads `None` as text, but null and a bare "prompt_type:" as no value. All three mean the prompt called None.
    prompt_type = str(entry["prompt_type"]) if "prompt_type" in entry else None
    if prompt_type is not None:
        refuse_unknown([prompt_type], SYSTEM_PROMPTS, f"{where}: prompt_type", "value")
    return Source(
        path, entry.get("type") or "text", float(ratio), entry.get("root") or "", preprocess or None, prompt_type
    )


def refuse_unknown(given: Any, known: tuple[str, ...], where: str, what: str = "key") -> None:
    """ConfigError for the first of the given words that is not known, with the one that was meant."""
    for key in given:
        if key not in known:
            plain = {name.lower(): name for name in known}
            close = difflib.get_close_matches(str(key).lower(), plain, n=1)
            hint = f"did you mean {plain[close[0]]!r}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"{where}: unknown {what} {key!r}; {hint}")


class Records(ABC):
    """The N items of a file. `lines` (N,) are their line numbers, or row numbers where a file has no lines."""

    lines: np.ndarray

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return len(self.lines)

    @abstractmethod
    def read(self, index: int) -> Any:
        """Item number `index`. InputError names its file and line, and says why it cannot be read."""

    def place(self, line: int) -> str:
        return place(self.path, line)


def place(path: Path, line: int) -> str:
    return f"{path}:row {line}" if path.suffix == ".parquet" else f"{path}:{line}"


def open_records(path: Path) -> Records:
    """Index a .json, .jsonl, .csv or .parquet file. Raises InputError for a file that is broken as a whole, and
    MissingExtraError for parquet without pyarrow."""
    return _KINDS[path.suffix](path)


class _Spans(Records):
    """Items that are pieces of one text file, each of them a JSON value."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with open(path, "rb") as file:
            empty = not path.stat().st_size
            self._bytes: mmap.mmap | bytes = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._newlines = _newlines(self._bytes)
        self._starts, self._ends = self._spans()
        self.lines = np.searchsorted(self._newlines, self._starts) + 1

    @abstractmethod
    def _spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each item begins and ends, in bytes."""

    def read(self, index: int) -> Any:
        text = self._bytes[self._starts[index] : self._ends[index]]
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            line = int(self.lines[index]) + (error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0)
            raise InputError(f"{self.place(line)}: not valid JSON ({_reason(error)})") from error

    def _line_spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each line that is not blank begins and ends."""
        size, ends = len(self._bytes), self._newlines
        if size and (not len(ends) or ends[-1] != size - 1):
            ends = np.append(ends, size)  # the last line lacks its newline
        starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
        keep = np.ones(len(ends), bool)
        if size:
            first = np.frombuffer(self._bytes, np.uint8)[np.minimum(starts, size - 1)]
            for n in np.flatnonzero(np.isin(first, list(b" \t\r\n"))):
                keep[n] = bool(self._bytes[starts[n] : ends[n]].strip())
        return starts[keep], ends[keep]


def _newlines(text: Any) -> np.ndarray:
    """The positions of a file's newlines (int64).

    The file is searched piece by piece, since a comparison makes an array as large as what it compares.
    """
    every, piece = np.frombuffer(text, np.uint8), 1 << 24
    found = [np.flatnonzero(every[i : i + piece] == 10) + i for i in range(0, len(every), piece)]
    return np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


class _JsonLines(_Spans):
    def _spans(self) -> tuple[np.ndarray, np.ndarray]:
        return self._line_spans()


class _JsonList(_Spans):
    """One list of objects. They are found by their brackets: so each has its line, and none is kept in memory."""

    # Anything that is no bracket (a string may hold brackets), and then a bracket.
    _BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+([\[\]{}])', re.DOTALL)

    def _spans(self) -> tuple[np.ndarray, np.ndarray]:
        begin = self._bytes[:64].removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if begin == b"{" and self._is_lines():
            return self._line_spans()
        if begin != b"[":
            self._refuse()
        starts: list[int] = []
        ends: list[int] = []
        depth = behind = at = 0
        while found := self._BRACKET.match(self._bytes, at):
            at = found.end()
            if found[1] in b"[{":
                depth += 1
                if depth == 1:
                    behind = at
                elif depth == 2:
                    if found[1] == b"[" or self._bytes[behind : at - 1].strip() != (b"," if starts else b""):
                        self._refuse()
                    starts.append(at - 1)
            else:
                depth -= 1
                if depth == 1:
                    ends.append(at)
                    behind = at
                elif depth < 1:
                    if depth or self._bytes[behind : at - 1].strip() or self._bytes[at:].strip():
                        self._refuse()
                    break
        if depth:
            self._refuse()
        return np.asarray(starts, np.int64), np.asarray(ends, np.int64)

    def _is_lines(self) -> bool:
        """Whether the file is JSON Lines under another name: its first line is an object by itself."""
        try:
            return len(self._newlines) > 0 and isinstance(json.loads(self._bytes[: self._newlines[0]]), dict)
        except ValueError:
            return False

    def _refuse(self) -> None:
        """Raise InputError that says what is wrong with a file that does not look like a list of objects."""
        try:
            value = json.loads(self._bytes[:])
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
            raise InputError(f"{self.place(line)}: not valid JSON ({_reason(error)})") from error
        if isinstance(value, list):
            index, item = next((n, item) for n, item in enumerate(value) if not isinstance(item, dict))
            raise InputError(f"{self.path}: [{index}]: got {item!r:.60}, but an item must be an object")
        raise InputError(f"{self.path}: expected a list of items, found {type(value).__name__}")


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    """InputError for a table in which no column can hold answers. An empty file has no items, and passes."""
    if columns and not set(columns) & set(ANSWERS):
        raise InputError(
            f"{path}: found the columns {listed(columns, 8)}, but items need conversations, or messages, or "
            "instruction and output, or text (with preprocess: caption: url and caption)"
        )


class _Csv(Records):
    """A table whose first row names its columns. Tabs separate them where that row has any, else commas."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        csv.field_size_limit(sys.maxsize)
        self._rows: list[list[str]] = []
        lines: list[int] = []
        begin = 1
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                tabs = "\t" in file.readline()
                file.seek(0)
                reader = csv.reader(file, delimiter="\t" if tabs else ",", strict=True)
                self._columns = next(reader, [])
                begin = reader.line_num + 1
                for row in reader:
                    if row:
                        self._rows.append(row)
                        lines.append(begin)
                    begin = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{self.place(begin)}: not valid CSV ({error})") from error
        _check_columns(path, self._columns)
        self.lines = np.asarray(lines, np.int64)

    def read(self, index: int) -> Any:
        row = self._rows[index]
        if len(row) != len(self._columns):
            raise InputError(
                f"{self.place(int(self.lines[index]))}: has {len(row)} fields, but the first row names "
                f"{len(self._columns)} columns"
            )
        return {name: value for name, value in zip(self._columns, row, strict=True) if name in KNOWN_COLUMNS}


class _Parquet(Records):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise MissingExtraError(f"{path}: parquet needs pyarrow: pip install 'mixtral-accessory[data]'") from error
        try:
            every = parquet.read_schema(path).names
            names = [name for name in every if name in KNOWN_COLUMNS]
            self._table = parquet.read_table(path, columns=names, memory_map=True)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise InputError(f"{path}: not a parquet file ({' '.join(str(error).split())})") from error
        _check_columns(path, every)
        self.lines = np.arange(1, self._table.num_rows + 1)

    def read(self, index: int) -> Any:
        row = self._table.slice(index, 1).to_pylist()[0]
        return {name: value for name, value in row.items() if value is not None}


_KINDS: dict[str, type[Records]] = {".json": _JsonList, ".jsonl": _JsonLines, ".csv": _Csv, ".parquet": _Parquet}
