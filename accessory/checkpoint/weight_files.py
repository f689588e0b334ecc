"""Open the weight files of a folder, and report which are missing or broken."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accessory.checkpoint.files import Pieces, read_file, read_pickle
from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.model_files import RESOURCES, ModelFiles, model_files
from accessory.config import read_json
from accessory.errors import AccessoryError, CheckpointError, listed

log = logging.getLogger(__name__)

PEFT_CONFIG = "adapter_config.json"  # in every adapter folder of PEFT
IS_PEFT = "is a PEFT adapter; bring it in with `accessory adapter import` first"
_CONFIGS = ("config.json", "params.json", "meta.json")


@dataclass
class WeightFiles:
    """The weight files of one model. `paths` maps names to paths, None if the file is missing."""

    paths: dict[str, Path | None] = field(default_factory=dict)
    sharded: bool = False  # model-parallel shards RR-of-NN
    pieces: dict[str, list[Path]] = field(default_factory=dict)  # name of the whole → its parts
    problems: list[str] = field(default_factory=list)
    instead: str = ""  # a warning that files of another form are incomplete

    @property
    def present(self) -> list[Path]:
        return [p for p in self.paths.values() if p is not None] + [p for ps in self.pieces.values() for p in ps]

    def read(self) -> dict[str, dict[str, Lazy] | None]:
        """Read the raw tensors of each file: None, and an entry in `problems`, if it is missing or broken."""
        if self.instead:
            log.warning("%s", self.instead)
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
            if self.problems:  # a cut file with a missing piece cannot be read
                continue
            try:
                out[name] = read_pickle(parts[0].with_name(name), Pieces(parts))
            except AccessoryError as error:
                self.problems.append(str(error).replace(str(parts[0].with_name(name)), f"{name} (its pieces joined)"))
        return out


def find_weights(folder: Path) -> WeightFiles:
    """Find the weight files of one model in `folder`. If it holds the model in several forms, one is chosen.

    CheckpointError if there is no model, if an index is broken, or if the folder cannot be read. GGUF files do not
    count here: they are opened by their own names.
    """
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_file())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from error
    found = model_files(names, lambda index: read_json(folder / index), str(folder))
    if found is None or found.form.ends:
        raise CheckpointError(f"{folder}: {_instead(folder, names)}")
    weights = WeightFiles(sharded=found.form.sharded, instead=f"{folder}: {found.instead}" if found.instead else "")
    if found.doubt:
        weights.problems.append(found.doubt)
    if found.form.in_pieces:
        _add_pieces(weights, folder, found)
        return weights
    weights.paths = {name: None if name in found.missing else folder / name for name in found.files}
    if found.missing:
        there = len(found.files) - len(found.missing)
        weights.problems.append(f"missing file {listed(found.missing)} ({there} of {len(found.files)} present)")
    return weights


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that is the only model in the folder `path`; else None."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    try:
        names = sorted(p.name for p in path.iterdir() if p.is_file())
        found = model_files(names, lambda index: read_json(path / index), str(path))
    except (OSError, AccessoryError):
        return None
    return path / found.files[0] if found is not None and found.form.ends and not found.doubt else None


def _instead(folder: Path, names: Sequence[str]) -> str:
    """What a folder without a model is or holds."""
    if PEFT_CONFIG in names:
        return IS_PEFT
    below = [str(sub) for sub in sorted(folder.iterdir()) if sub.is_dir() and _holds_model(sub)]
    if below:
        return f"no checkpoint in this folder, but below it; give {'one of ' * (len(below) > 1)}{listed(below)}"
    return f"no checkpoint in this folder; it holds {listed(names) or 'no files'}"


def _holds_model(folder: Path) -> bool:
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_file())
        found = model_files(names, lambda index: read_json(folder / index), str(folder))
    except (OSError, AccessoryError):
        return False
    return found is not None and not found.form.ends


def find_resources(folder: Path) -> list[Path]:
    """The files in `folder` that accompany the weights, such as the tokenizer, without the configuration files."""
    return [folder / name for name in sorted(RESOURCES - set(_CONFIGS)) if (folder / name).is_file()]


def _add_pieces(weights: WeightFiles, folder: Path, found: ModelFiles) -> None:
    lacking: dict[str, list[str]] = {}
    for name in found.files:
        whole = name.rpartition("-")[0]
        pieces = weights.pieces.setdefault(whole, [])
        if name in found.missing:
            lacking.setdefault(whole, []).append(name)
        else:
            pieces.append(folder / name)
    for whole, names in lacking.items():
        weights.problems.append(f"missing file {listed(names)} (a piece of {whole})")
