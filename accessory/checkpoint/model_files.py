"""Which of a folder's or a repository's file names are the weights of one model, and which of them are missing.

FORMS is the one table of it. `model_files` reads it and reports; `files_to_load` is for who needs a whole model.
Names are all that is looked at, besides an index: what is not needed is neither fetched nor opened.
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

# What comes along with the weights, whichever form they are in.
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
_NAMED = 8  # files that one message names
_DIGITS = r"\d{1,5}"  # five are the most in use; a longer number would make us list millions of missing files


@dataclass(frozen=True)
class Form:
    """One form in which the weights of a model are published: what their files are called.

    It may be spelled in several ways: a set of numbered files, one file, files under an index.
    """

    numbered: str = ""  # one of a set of files: its {number}, the {count} of them, the {whole} that it is a piece of
    first: int = 0  # the number that a set begins with
    single: str = ""  # the one file
    index: str = ""  # JSON, whose weight_map says which file holds which tensor
    ends: tuple[str, ...] = ()  # the one file whose name ends so; only where no form above has any file
    sharded: bool = False  # every file of a set holds a part of every tensor
    parts_only: bool = False  # only where a part of a model is wanted, such as an image encoder

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pattern = re.escape(self.numbered)
        for field in ("number", "count", "whole"):
            pattern = pattern.replace(re.escape(f"{{{field}}}"), f"(?P<{field}>{_DIGITS})")
        return re.compile(pattern)

    @property
    def in_pieces(self) -> bool:
        """Whether the files of a set, put end to end, are one file."""
        return "{whole}" in self.numbered

    def match(self, name: str) -> re.Match[str] | None:
        """`name` as one of a set, with its groups number, count and whole; None for any other file."""
        return self._pattern.fullmatch(name) if self.numbered else None

    def has(self, name: str) -> bool:
        """Whether a file of this name holds weights in this form."""
        single = bool(name) and name == self.single
        return single or bool(self.ends and name.endswith(self.ends)) or self.match(name) is not None


# A folder often holds one model several times over, safetensors beside pickles, or the original beside a conversion.
# The first form that is whole is the model: a download or an upload that was broken off does not hide another copy. If
# none is whole, the first form of which there is anything is the model, and its other files are missing.
#
# Within a form an index comes first, since it alone says what belongs together: transformers writes shards beside an
# old model.safetensors and leaves it there. It also leaves an old index beside a new model.safetensors; then files of
# the index are missing, and the single file is the model. Without an index nothing says which of two whole sets is
# meant, be they model.safetensors and numbered shards, or shards of two counts: they are refused, not guessed at.
FORMS = (
    # Ours and the original's: made out of one of the others for this program, so it is what is meant to be loaded.
    Form("consolidated.{number}-of-{count}.model.safetensors", sharded=True),
    Form("consolidated.{number}-of-{count}.model.pth", sharded=True),
    # Safetensors before pickles, which may hold code. Hugging Face's names before Mistral's, as config.json, which
    # belongs to the one, goes before params.json, which belongs to the other.
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
    # The first publication before what was converted from it; .pth, which we write too, before .pt.
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
    # Never instead of the others, since it is no copy of them: its numbers are rounded, and few commands read it.
    Form(ends=(".gguf",)),
    # Image encoders are published under many names. Where there are several forms, the safetensors.
    Form(ends=(".safetensors",), parts_only=True),
    Form(ends=(".bin", ".pt", ".pth"), parts_only=True),
)


@dataclass(frozen=True)
class ModelFiles:
    """The names of the files that make up one model."""

    form: Form
    files: tuple[str, ...]  # all of them; a set in the order of its numbers
    missing: tuple[str, ...] = ()  # those that are not there
    index: str = ""  # the index that names them
    doubt: str = ""  # why it is open which files are meant
    passed_over: ModelFiles | None = None  # a form that comes before this one and is not whole

    @property
    def shortfall(self) -> str:
        """What is missing, in words."""
        if self.index:
            return f"{self.index} names files that are not in its folder: {listed(self.missing, _NAMED)}"
        like = next((name for name in self.files if name not in self.missing), self.files[0])
        numbers = [str(int(match["number"])) for match in map(self.form.match, self.missing) if match]
        return f"of {like} and its like, numbers [{listed(numbers, _NAMED)}] are missing"

    @property
    def instead(self) -> str:
        """What a user should know where another form was passed over, in words; "" where none was."""
        if self.passed_over is None:
            return ""
        return f"{self.passed_over.shortfall}; read instead: {listed(self.files, 2)}"


def model_files(
    names: Collection[str], read_index: ReadIndex, origin: str, wanted: Wanted | None = None
) -> ModelFiles | None:
    """Pick the files of one model out of the names in a folder, by FORMS; None where no form has any file.

    `read_index` gives the contents of an index, given its name. `origin` is what a message calls the folder. `wanted`
    says which tensors are wanted, by name: files that hold none of them are left out as far as an index tells.
    Raises CheckpointError for an index that is none, and passes on what `read_index` raises of it.
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
    """Pick what is needed of a whole model out of the names in a folder: weights, index, configuration, tokenizer.

    Arguments are those of `model_files`; `elsewhere` are folders to suggest where this one holds no checkpoint. Raises
    CheckpointError for none, for one with files missing, and where it is open which files are meant.
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
    """A file's own name, which cannot lead out of its folder."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0:")


def _by_end(form: Form, present: Sequence[str]) -> ModelFiles | None:
    found = tuple(name for name in present if form.has(name))
    if len(found) > 1 and not form.parts_only:
        return ModelFiles(form, found, doubt=f"several .gguf files, name one of them: {listed(found, _NAMED)}")
    return ModelFiles(form, found) if len(found) == 1 else None


def _in_form(
    form: Form, present: Sequence[str], read_index: ReadIndex, origin: str, wanted: Wanted | None
) -> ModelFiles | None:
    """What there is in one form: as its index says, or else the set that is whole, or else the one with most files."""
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
        # A set of which the index says that it is only a part is not whole.
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
    """The sets of numbered files, the largest first. The pieces of all files that were cut are one set."""
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
    """How many files a set has, by the name of one of them; -1 where names do not tell."""
    return int(match.groupdict().get("count", -1))


def _set(form: Form, count: int, matches: Sequence[re.Match[str]]) -> ModelFiles:
    """The set that these files belong to: numbers without a gap, up to the count, or else up to the highest number."""
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
