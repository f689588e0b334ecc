"""Find the weight files of one model among the names in a folder or repository, and those that are missing.

The table FORMS lists how weights are published. `model_files` applies it and reports what it found; `files_to_load`
raises unless the model is whole. Both look only at names and at an index, so nothing else is fetched or opened.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from accessory.errors import CheckpointError, ConfigError, listed

log = logging.getLogger(__name__)

ReadIndex = Callable[[str], Mapping[str, Any]]
Wanted = Callable[[str], bool]

# Files that accompany the weights, in every form.
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
_NAMED = 8  # how many files one message names
_DIGITS = r"\d{1,5}"  # nobody uses more than five; with more we would list millions of missing files


@dataclass(frozen=True)
class Form:
    """One form in which the weights of a model are published: how its files are named.

    A form may allow a set of numbered files, a single file, and files that an index lists.
    """

    numbered: str = ""  # a file of a set: its {number}, their {count}, the {whole} file it is a piece of
    first: int = 0  # the number that a set begins with
    single: str = ""  # the name of a single file
    index: str = ""  # a JSON file whose weight_map maps tensors to files
    ends: tuple[str, ...] = ()  # endings of a single file; only if no form above has any file
    sharded: bool = False  # every file of a set holds a part of every tensor
    parts_only: bool = False  # used only for a part of a model, such as an image encoder

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pattern = re.escape(self.numbered)
        for field in ("number", "count", "whole"):
            pattern = pattern.replace(re.escape(f"{{{field}}}"), f"(?P<{field}>{_DIGITS})")
        return re.compile(pattern)

    @property
    def in_pieces(self) -> bool:
        """Whether the files of a set form one file when put end to end."""
        return "{whole}" in self.numbered

    def match(self, name: str) -> re.Match[str] | None:
        """Match `name` as a file of a set; the groups are number, count and whole. None for any other file."""
        return self._pattern.fullmatch(name) if self.numbered else None

    def has(self, name: str) -> bool:
        """Whether a file of this name holds weights in this form."""
        single = bool(name) and name == self.single
        return single or bool(self.ends and name.endswith(self.ends)) or self.match(name) is not None


# A folder often holds several copies of one model, such as safetensors and pickles, or an original and a conversion.
# The first complete form is the model, so an interrupted download or upload does not hide another copy. If no form is
# complete, the first form with any file is the model, and its other files are missing.
#
# Within a form an index comes first, because only an index says which files belong together. transformers writes shards
# next to an old model.safetensors and leaves that file there. It also leaves an old index next to a new
# model.safetensors; then files of the index are missing, and the single file is the model. Without an index, nothing
# says which of two complete sets is meant: model.safetensors or numbered shards, or shards of two counts. We refuse
# such folders instead of guessing.
FORMS = (
    # Our shards and those of the original project. They were converted for this program, so they come first.
    Form("consolidated.{number}-of-{count}.model.safetensors", sharded=True),
    Form("consolidated.{number}-of-{count}.model.pth", sharded=True),
    # Safetensors come before pickles, because pickles may hold code. Hugging Face's names come before Mistral's,
    # because config.json (Hugging Face) takes precedence over params.json (Mistral).
    Form(
        "model-{number}-of-{count}.safetensors",
        first=1,
        single="model.safetensors",
        index="model.safetensors.index.json",
    ),
    Form(
        "consolidated-{number}-of-{count}.safetensors",
        first=1,
        single="consolidated.safetensors",
        index="consolidated.safetensors.index.json",
    ),
    # The first publication comes before its conversions, and .pth, which we also write, before .pt.
    Form("consolidated.{number}.pth"),
    Form("consolidated.{number}.pt"),
    Form(
        "pytorch_model-{number}-of-{count}.bin",
        first=1,
        single="pytorch_model.bin",
        index="pytorch_model.bin.index.json",
    ),
    # Last of the pickles, because their names do not tell whether the last piece is there.
    Form("consolidated.{whole}.pth-split{number}"),
    # GGUF never replaces another form, because it is no copy: its numbers are rounded, and few commands read it.
    Form(ends=(".gguf",)),
    # Image encoders are published under many names. Safetensors are preferred.
    Form(ends=(".safetensors",), parts_only=True),
    Form(ends=(".bin", ".pt", ".pth"), parts_only=True),
)


@dataclass(frozen=True)
class ModelFiles:
    """The names of the files that make up one model."""

    form: Form
    files: tuple[str, ...]  # all of them; a set in the order of its numbers
    missing: tuple[str, ...] = ()  # the files that do not exist
    index: str = ""  # the index that names them
    doubt: str = ""  # why it is unclear which files are meant
    passed_over: ModelFiles | None = None  # files that would have come first but are incomplete

    @property
    def shortfall(self) -> str:
        """A message that names the missing files."""
        if self.index:
            return f"{self.index} names files that are not in its folder: {listed(self.missing, _NAMED)}"
        like = next((name for name in self.files if name not in self.missing), self.files[0])
        numbers = [str(int(match["number"])) for match in map(self.form.match, self.missing) if match]
        return f"of {like} and its like, numbers [{listed(numbers, _NAMED)}] are missing"

    @property
    def instead(self) -> str:
        """A warning that incomplete files were passed over; "" if none were."""
        if self.passed_over is None:
            return ""
        return f"{self.passed_over.shortfall}; read instead: {listed(self.files, 2)}"


def model_files(
    names: Collection[str], read_index: ReadIndex, origin: str, wanted: Wanted | None = None
) -> ModelFiles | None:
    """Pick the files of one model out of the names in a folder, by FORMS; None if no form has any file.

    `read_index` returns the contents of the index with the given name. `origin` names the folder in messages. `wanted`
    selects tensors by name: if an index shows that a file holds none of them, the file is left out. Raises
    CheckpointError for an index that is not one, and lets other exceptions of `read_index` through.
    """
    present = sorted(set(names))
    incomplete: ModelFiles | None = None
    for form in FORMS:
        if form.ends:
            found = _by_end(form, present) if incomplete is None and form.parts_only == (wanted is not None) else None
        else:
            found = _in_form(form, present, read_index, origin, wanted)
        if found is not None and not found.missing:
            return replace(found, passed_over=incomplete or found.passed_over)
        incomplete = incomplete or found
    return incomplete


def files_to_load(
    names: Collection[str],
    read_index: ReadIndex,
    origin: str,
    elsewhere: Sequence[str] = (),
    wanted: Wanted | None = None,
) -> list[str]:
    """Pick all files of a whole model out of the names in a folder: weights, index, configuration, tokenizer.

    Arguments are those of `model_files`. The message suggests the folders `elsewhere` if this one holds no checkpoint.
    Raises CheckpointError if there is no checkpoint, if files are missing, and if it is unclear which files are meant.
    """
    found = model_files(names, read_index, origin, wanted)
    if found is None:
        has = f"it has {listed(sorted(names), _NAMED) or 'none'}"
        hint = f"folders that hold one: {listed(elsewhere, _NAMED)}" if elsewhere else has
        raise CheckpointError(f"{origin}: no checkpoint among the files of this folder; {hint}")
    if found.missing:
        raise CheckpointError(f"{origin}: {found.shortfall}")
    if found.doubt:
        raise CheckpointError(f"{origin}: {found.doubt}")
    if found.instead:
        log.warning("%s: %s", origin, found.instead)
    return [*found.files, *([found.index] if found.index else []), *sorted(RESOURCES & set(names))]


def holds_weights(name: str) -> bool:
    """Whether a file of this name holds weights of a model."""
    return any(form.has(name) for form in FORMS if not form.parts_only)


def is_plain(name: str) -> bool:
    """Whether `name` is a bare file name, which cannot lead out of its folder."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0:")


def _by_end(form: Form, present: Sequence[str]) -> ModelFiles | None:
    found = tuple(name for name in present if form.has(name))
    if len(found) > 1 and not form.parts_only:
        return ModelFiles(form, found, doubt=f"several .gguf files, name one of them: {listed(found, _NAMED)}")
    return ModelFiles(form, found) if len(found) == 1 else None


def _in_form(
    form: Form, present: Sequence[str], read_index: ReadIndex, origin: str, wanted: Wanted | None
) -> ModelFiles | None:
    """The files in one form: of a complete index, or a complete set, or an incomplete index, or the largest set."""
    there = set(present)
    sets = _numbered(form, present)
    if form.single in there:
        sets.append(ModelFiles(form, (form.single,)))
    indexed = None
    if form.index in there:
        weight_map = _weight_map(form.index, read_index, origin)
        files = tuple(sorted({file for tensor, file in weight_map.items() if wanted is None or wanted(tensor)}))
        missing = tuple(file for file in files if not is_plain(file) or file not in there)
        if files and not missing:
            return ModelFiles(form, files, index=form.index)
        indexed = ModelFiles(form, files, missing, index=form.index) if files else None
        # A set that shares files with the index is only a part of what the index lists.
        sets = [found for found in sets if set(weight_map.values()).isdisjoint(found.files)]
    whole = [found for found in sets if not found.missing]
    if not whole and indexed is not None:
        return indexed
    candidates = whole or sets
    if not candidates:
        return None
    doubt = _two_models(form, candidates) if len(candidates) > 1 else candidates[0].doubt
    return replace(candidates[0], doubt=doubt, passed_over=indexed)


def _weight_map(index: str, read_index: ReadIndex, origin: str) -> Mapping[str, str]:
    try:
        weight_map = read_index(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(f"{origin}: {index}: not an index: {error}") from error
    whole = isinstance(weight_map, Mapping) and all(isinstance(file, str) for file in weight_map.values())
    if not weight_map or not whole:
        raise CheckpointError(f"{origin}: {index}: not an index: it has no weight_map from tensors to files")
    return weight_map


def _two_models(form: Form, candidates: Sequence[ModelFiles]) -> str:
    counts = sorted(len(found.files) for found in candidates if found.files != (form.single,))
    what = f"shards of {' and of '.join(map(str, counts))}"
    if any(found.files == (form.single,) for found in candidates):
        what = f"{form.single} and {what}"
    keep = "keep one of them, or the index that says which is meant" if form.index else "keep one of them"
    return f"{what} lie in one folder, e.g. {candidates[0].files[0]}; {keep}"


def _numbered(form: Form, present: Sequence[str]) -> list[ModelFiles]:
    """The sets of numbered files, the largest first. The pieces of all cut files form one set."""
    groups: dict[tuple[str, int], list[re.Match[str]]] = {}
    for name in present:
        if match := form.match(name):
            groups.setdefault((match.groupdict().get("whole", ""), _count(match)), []).append(match)
    sets = [_set(form, count, matches) for (_, count), matches in sorted(groups.items()) if count != 0]
    if form.in_pieces and sets:
        return [
            ModelFiles(
                form,
                tuple(name for found in sets for name in found.files),
                tuple(name for found in sets for name in found.missing),
                doubt=next((found.doubt for found in sets if found.doubt), ""),
            )
        ]
    return sorted(sets, key=lambda found: -len(found.files))


def _count(match: re.Match[str]) -> int:
    """The number of files in a set, taken from the name of one of them; -1 if names do not say it."""
    return int(match.groupdict().get("count", -1))


def _set(form: Form, count: int, matches: Sequence[re.Match[str]]) -> ModelFiles:
    """The set that these files belong to: all numbers up to the count or, without a count, up to the highest number."""
    there: dict[int, str] = {}
    doubt = ""
    for match in matches:
        number = int(match["number"])
        if number in there:
            doubt = f"{there[number]} and {match.string} have the same number; keep one of them"
        there[number] = match.string
    like = min(matches, key=lambda match: len(match["number"]))
    before, after = like.string[: like.start("number")], like.string[like.end("number") :]
    numbers = range(form.first, form.first + count if count > 0 else max(there) + 1)
    spelled = {number: before + str(number).zfill(len(like["number"])) + after for number in numbers}
    missing = tuple(name for number, name in spelled.items() if number not in there)
    return ModelFiles(form, tuple((spelled | there)[number] for number in numbers), missing, doubt=doubt)
