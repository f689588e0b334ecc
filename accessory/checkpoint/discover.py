"""Which files of a folder hold one model, and which of them are missing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accessory.checkpoint.choose import RESOURCES
from accessory.checkpoint.files import Pieces, read_file, read_pickle
from accessory.checkpoint.lazy import Lazy
from accessory.config import read_json
from accessory.errors import AccessoryError, CheckpointError, ConfigError, listed

MARKER = ".writing"  # in a folder that is being written, and in what a killed writer left
CONFIGS = ("config.json", "params.json", "meta.json")

_SHARD = re.compile(r"consolidated\.(\d+)-of-(\d+)\.model\.(pth|safetensors)")
_NUMBERED = re.compile(r"(model|pytorch_model|consolidated)-(\d+)-of-(\d+)\.(safetensors|bin)")
_CONSOLIDATED = re.compile(r"consolidated\.(\d+)\.(pth|pt)")
_PIECE = re.compile(r"(consolidated\.\d+\.pth)-split(\d+)")
_SINGLE = ("model", "consolidated", "pytorch_model")  # in order of preference: stem of the file, its index or its parts


@dataclass
class WeightFiles:
    """The files that make up one model: name → path, None where it is missing."""

    paths: dict[str, Path | None] = field(default_factory=dict)
    sharded: bool = False  # model-parallel shards RR-of-NN
    pieces: dict[str, list[Path]] = field(default_factory=dict)  # name of the whole → its parts
    problems: list[str] = field(default_factory=list)

    @property
    def present(self) -> list[Path]:
        return [p for p in self.paths.values() if p is not None] + [p for ps in self.pieces.values() for p in ps]

    def read(self) -> dict[str, dict[str, Lazy] | None]:
        """The raw tensors of each file, None (and a problem) where it is missing or broken."""
        out: dict[str, dict[str, Lazy] | None] = {}
        for name, path in self.paths.items():
            out[name] = None
            if path is None:
                continue
            try:
                out[name] = read_file(path)
            except AccessoryError as error:
                self.problems.append(str(error).replace(str(path), name))
        for name, parts in self.pieces.items():
            out[name] = None
            if self.problems:  # a whole with a hole in it cannot be read
                continue
            try:
                out[name] = read_pickle(parts[0].with_name(name), Pieces(parts))
            except AccessoryError as error:
                self.problems.append(str(error).replace(str(parts[0].with_name(name)), f"{name} (its pieces joined)"))
        return out


def find_weights(folder: Path) -> WeightFiles:
    """The files of one model in `folder`; where it holds the model in several forms, one of them.

    CheckpointError if there is none or the folder cannot be read.
    """
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_file())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from error
    for find in (_find_shards, _find_files, _find_consolidated, _find_bins, _find_pieces):
        found = find(folder, names)
        if found is not None:
            return found
    raise CheckpointError(f"{folder}: no checkpoint in this folder; it holds {listed(names) or 'no files'}")


def find_resources(folder: Path) -> list[Path]:
    """Tokenizer files and the like, which come along with the weights."""
    return [folder / name for name in sorted(RESOURCES - set(CONFIGS)) if (folder / name).is_file()]


def _find_shards(folder: Path, names: Sequence[str]) -> WeightFiles | None:
    matches = [m for m in map(_SHARD.fullmatch, names) if m]
    if not matches:
        return None
    totals = sorted({int(m[2]) for m in matches})
    kinds = {m[3] for m in matches}
    total, kind = totals[-1], "safetensors" if "safetensors" in kinds else "pth"
    found = WeightFiles(sharded=True)
    if len(totals) > 1:
        found.problems.append(f"shards of {' and of '.join(map(str, totals))} lie in one folder, e.g. {matches[0][0]}")
    here = {(int(m[1]), m[3]): m[0] for m in matches if int(m[2]) == total}
    for rank in range(total):
        width = len(matches[0][1])
        name = here.get((rank, kind), f"consolidated.{rank:0{width}d}-of-{total:0{width}d}.model.{kind}")
        found.paths[name] = folder / name if name in names else None
    found.problems += _missing(found.paths)
    return found


def _missing(paths: Mapping[str, Path | None]) -> list[str]:
    lacking = [name for name, path in paths.items() if path is None]
    return (
        [f"missing file {', '.join(lacking)} ({len(paths) - len(lacking)} of {len(paths)} present)"] if lacking else []
    )


def _find_files(folder: Path, names: Sequence[str], stems: Sequence[str] = _SINGLE[:2], end: str = "safetensors"):
    for stem in stems:
        index, single = f"{stem}.{end}.index.json", f"{stem}.{end}"
        numbered = [m for m in map(_NUMBERED.fullmatch, names) if m and m[1] == stem and m[4] == end]
        if index not in names and single not in names and not numbered:
            continue
        if index in names:
            wanted = _indexed(folder / index)
        elif numbered:
            total = numbered[0][3]
            wanted = [f"{stem}-{i:0{len(total)}d}-of-{total}.{end}" for i in range(1, int(total) + 1)]
        else:
            wanted = [single]
        found = WeightFiles(paths={name: folder / name if name in names else None for name in wanted})
        found.problems += _missing(found.paths)
        return found
    return None


def _find_bins(folder: Path, names: Sequence[str]) -> WeightFiles | None:
    return _find_files(folder, names, _SINGLE[2:], "bin")


def _indexed(index: Path) -> list[str]:
    try:
        content: Any = read_json(index)
        return sorted(set(content["weight_map"].values()))
    except (ConfigError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors files: {error}") from error


def _find_consolidated(folder: Path, names: Sequence[str]) -> WeightFiles | None:
    matches = [m for m in map(_CONSOLIDATED.fullmatch, names) if m]
    if not matches:
        return None
    kind = "pt" if not any(m[2] == "pth" for m in matches) else "pth"
    wanted = [f"consolidated.{i:02d}.{kind}" for i in range(1 + max(int(m[1]) for m in matches if m[2] == kind))]
    found = WeightFiles(paths={name: folder / name if name in names else None for name in wanted})
    found.problems += _missing(found.paths)
    return found


def _find_pieces(folder: Path, names: Sequence[str]) -> WeightFiles | None:
    matches = [m for m in map(_PIECE.fullmatch, names) if m]
    if not matches:
        return None
    found = WeightFiles()
    for whole in sorted({m[1] for m in matches}):
        numbers = {int(m[2]): folder / m[0] for m in matches if m[1] == whole}
        lacking = [f"{whole}-split{i}" for i in range(max(numbers)) if i not in numbers]
        if lacking:
            found.problems.append(f"missing file {', '.join(lacking)} (a piece of {whole})")
        found.pieces[whole] = [numbers[i] for i in sorted(numbers)]
    return found
