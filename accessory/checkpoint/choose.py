"""Of the names of a folder's files, those that one layout needs: weights, index, configuration, tokenizer.

A folder often holds one model several times over, safetensors beside pickles, or the original beside a conversion.
Names are all that is looked at, so that the rest is not fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accessory.errors import CheckpointError, listed

# What comes along with the weights, whichever layout they are in.
RESOURCES = frozenset(
    [
        "config.json",
        "params.json",
        "meta.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "tokenizer.model.v1",
        "tokenizer.model.v2",
        "tokenizer.model.v3",
        "tekken.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    ]
)
_INDEXES = ("model.safetensors.index.json", "consolidated.safetensors.index.json", "pytorch_model.bin.index.json")

ReadIndex = Callable[[str], Mapping[str, Any]]
Wanted = Callable[[str], bool]


def choose(
    names: Sequence[str],
    read_index: ReadIndex,
    origin: str,
    elsewhere: Sequence[str] = (),
    wanted: Wanted | None = None,
) -> list[str]:
    """Of a folder's file names, those that one layout needs: weights, index, configuration, tokenizer.

    Safetensors win over pickles, and an accessory folder over a Hugging Face one over an official or torrent one over
    a GGUF file. `read_index` gives the contents of an index; `elsewhere` are folders to suggest where this one holds
    no checkpoint. `wanted` says which tensors, by name, are: files without any of them are left out, as far as an index
    tells, and a single file of weights will do, whatever it is called. Raises CheckpointError for none, for one with
    shards missing, and where several .gguf files leave it open which is meant.
    """
    weights = _weights(sorted(names), read_index, origin, wanted) or ([] if wanted is None else _only(names))
    if not weights:
        hint = (
            f"; folders that hold one: {listed(elsewhere, 8)}"
            if elsewhere
            else f"; it has {listed(sorted(names), 8) or 'none'}"
        )
        raise CheckpointError(f"{origin}: no checkpoint among the files of this folder{hint}")
    return weights + sorted(RESOURCES & set(names))


def _weights(names: list[str], read_index: ReadIndex, origin: str, wanted: Wanted | None) -> list[str]:
    present = set(names)
    accessory = [r"consolidated\.(?P<rank>\d+)-of-(?P<count>\d+)\.model\." + ext for ext in ("safetensors", "pth")]
    rules: list[Callable[[], list[str]]] = [
        *(lambda rule=rule: _numbered(names, rule, origin) for rule in accessory),
        lambda: _indexed(present, _INDEXES[0], read_index, origin, wanted),
        lambda: _one(present, "model.safetensors"),
        lambda: _numbered(names, r"model-(?P<rank>\d+)-of-(?P<count>\d+)\.safetensors", origin, first=1),
        lambda: _one(present, "consolidated.safetensors"),
        lambda: _indexed(present, _INDEXES[1], read_index, origin, wanted),
        lambda: _numbered(names, r"consolidated\.(?P<rank>\d+)\.pth", origin),
        lambda: _numbered(names, r"consolidated\.(?P<rank>\d+)\.pt", origin),
        lambda: _numbered(names, r"consolidated\.00\.pth-split(?P<rank>\d+)", origin),
        lambda: _indexed(present, _INDEXES[2], read_index, origin, wanted),
        lambda: _one(present, "pytorch_model.bin"),
        lambda: _only_gguf(names, origin),
    ]
    return next((found for rule in rules if (found := rule())), [])


def _only(names: Sequence[str]) -> list[str]:
    """The one file of weights under a name that no layout knows; where there are several forms, the safetensors."""
    for ends in ((".safetensors",), (".bin", ".pt", ".pth")):
        if len(found := [name for name in names if name.endswith(ends)]) == 1:
            return found
    return []


def _one(present: set[str], name: str) -> list[str]:
    return [name] if name in present else []


def _numbered(names: list[str], rule: str, origin: str, first: int = 0) -> list[str]:
    """The files whose numbers run without a gap from `first`, up to the count their names give."""
    groups: dict[int | None, dict[int, str]] = {}
    for name in names:
        if match := re.fullmatch(rule, name):
            count = match.groupdict().get("count")
            groups.setdefault(int(count) if count else None, {})[int(match["rank"])] = name
    problem = ""
    for count, files in sorted(groups.items(), key=lambda item: item[0] or 0):
        wanted = range(first, first + (count or max(files) + 1 - first))
        if not (missing := [rank for rank in wanted if rank not in files]):
            return [files[rank] for rank in wanted]
        problem = f"{origin}: of {next(iter(files.values()))} and its like, numbers {missing} are missing"
    if problem:
        raise CheckpointError(problem)
    return []


def _indexed(present: set[str], index: str, read_index: ReadIndex, origin: str, wanted: Wanted | None) -> list[str]:
    if index not in present:
        return []
    weight_map = read_index(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{origin}: {index} has no weight_map from tensors to files")
    files = sorted({file for tensor, file in weight_map.items() if wanted is None or wanted(tensor)})
    if missing := [name for name in files if not is_plain(name) or name not in present]:
        raise CheckpointError(f"{origin}: {index} names files that are not in its folder: {listed(missing, 8)}")
    return [*files, index]


def _only_gguf(names: list[str], origin: str) -> list[str]:
    found = [name for name in names if name.endswith(".gguf")]
    if len(found) > 1:
        raise CheckpointError(f"{origin}: several .gguf files, name one of them: {listed(found, 8)}")
    return found


def is_plain(name: str) -> bool:
    """A file's own name, which cannot lead out of its folder."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0:")
