"""Finetuning data: from a YAML that lists files to items of token ids, each knowing what of it is learnt.

Items are dialogues (`conversations`, or OpenAI's `messages`) or single turns (`instruction`, `input`, `output`). What
is wrong with one is said with its file and line. All ids lie in flat arrays, so a hundred thousand items cost no more
than their numbers, and an item is a slice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from accessory.data.conversation import Template, get_template
from accessory.data.records import Source, read_meta, read_records
from accessory.data.system_prompt import format_prompt
from accessory.data.tokenizer import Tokenizer
from accessory.errors import InputError

log = logging.getLogger(__name__)

_CACHE = ".accessory-cache"
_CACHE_FORMAT = 1


@dataclass(frozen=True)
class Example:
    """One item, encoded."""

    ids: list[int]
    learn: list[bool]  # of each id, whether a model learns to write it
    truncated: bool = False
    image: str | None = None


@dataclass(frozen=True)
class _Encoded:
    """A file's items, flat: item i is ids[start[i] : start[i + 1]]."""

    ids: np.ndarray  # int32
    learn: np.ndarray  # bool
    start: np.ndarray  # int64, items + 1
    truncated: np.ndarray  # bool, of each item
    places: list[str]
    images: list[str | None]
    dropped: int  # items of which nothing was left to learn once they were cut


class FinetuneData:
    """The items of all files of a META list; `lengths` and `groups` (int32 arrays) say what batches are made by."""

    def __init__(self, sources: list[Source], encoded: list[_Encoded], chosen: list[np.ndarray]) -> None:
        self.sources = sources
        self._encoded = encoded
        self.group_names = list(dict.fromkeys(s.group for s in sources))
        self._items = [(file, int(i)) for file, items in enumerate(chosen) for i in items]
        self.lengths = np.concatenate([np.diff(e.start)[c] for e, c in zip(encoded, chosen, strict=True)]).astype(
            np.int32
        )
        numbers = [self.group_names.index(s.group) for s in sources]
        self.groups = np.repeat(numbers, [len(c) for c in chosen]).astype(np.int32)
        self.truncated = int(sum(e.truncated[c].sum() for e, c in zip(encoded, chosen, strict=True)))
        self.dropped = sum(e.dropped for e in encoded)

    @classmethod
    def open(
        cls,
        meta: str | Path | Mapping[str, Any],
        tokenizer: Tokenizer,
        *,
        max_words: int,
        template: str | None = None,
        dialog: bool = True,
        cache_ann_on_disk: bool = False,
        seed: int = 0,
        progress: bool = True,
        problems: list[str] | None = None,
    ) -> FinetuneData:
        """Read and encode every item.

        max_words: tokens an item may have; longer ones are cut on the right. template: of dialogues, default
        "default"; "tokenizer" is the tokenizer's own. dialog: single turns are dialogues of two messages; without it,
        they follow their file's `prompt_type`. cache_ann_on_disk: keep what was encoded beside the files, and take it
        from there while file, tokenizer and options are the same.

        InputError names file and line of the first item that cannot be used; given a list of `problems`, all of them
        go there instead, and the items are left out. Items of which nothing to learn is left once they are cut are
        dropped, with a warning.
        """
        sources = read_meta(meta)
        how = _How(tokenizer, get_template(template or "default", tokenizer), max_words, dialog)
        encoded = [_read(s, how, cache_ann_on_disk and problems is None, progress, problems) for s in sources]
        chosen = [
            _choose(len(e.places), s.ratio, seed, n) for n, (s, e) in enumerate(zip(sources, encoded, strict=True))
        ]
        if not any(len(c) for c in chosen):
            if problems:
                raise InputError(f"{problems[0]}" + (f" and {len(problems) - 1} more" if len(problems) > 1 else ""))
            raise InputError(f"data_config: no item is left in {', '.join(str(s.path) for s in sources)}")
        data = cls(sources, encoded, chosen)
        if data.truncated or data.dropped:
            log.warning(
                "%d of %d items are longer than max_words = %d and cut; %d more had nothing to learn in what was left",
                data.truncated, len(data), max_words, data.dropped,
            )  # fmt: skip
        return data

    def __len__(self) -> int:
        return len(self._items)

    def example(self, item: int) -> Example:
        file, i = self._items[item]
        e = self._encoded[file]
        at = slice(e.start[i], e.start[i + 1])
        return Example(e.ids[at].tolist(), e.learn[at].tolist(), bool(e.truncated[i]), e.images[i])

    def where(self, item: int) -> str:
        """The item's file and line (or index, in a JSON list)."""
        file, i = self._items[item]
        return self._encoded[file].places[i]

    def source_of(self, item: int) -> Source:
        return self.sources[self._items[item][0]]

    def fingerprint(self) -> str:
        """A digest of all items in order: equal for equal data, whatever the files are called."""
        digest = hashlib.sha256(self.lengths.tobytes() + self.groups.tobytes())
        for e in self._encoded:
            digest.update(e.ids.tobytes() + e.learn.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _How:
    tokenizer: Tokenizer
    template: Template
    max_words: int
    dialog: bool

    def key(self, source: Source) -> str:
        """What an encoded file depends on."""
        stat = source.path.stat()
        parts = [
            _CACHE_FORMAT, source.path.name, stat.st_size, stat.st_mtime_ns, source.root, source.prompt_type,
            self.template.name, self.tokenizer.chat_template, self.max_words, self.dialog,
            hashlib.sha256(self.tokenizer.path.read_bytes()).hexdigest(),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def encode_item(item: Any, source: Source, how: _How) -> tuple[list[int], list[bool], str | None]:
    """(ids, learnt, image) of one item. InputError says what is wrong with it."""
    if not isinstance(item, Mapping):
        raise InputError(f"got a {type(item).__name__}, but an item must be an object")
    image = _image(item, source)
    turns = item.get("conversations", item.get("messages"))
    if turns is not None:
        if not any(t.get("role", t.get("from")) in ("assistant", "gpt") for t in turns if isinstance(t, Mapping)):
            if isinstance(turns, list) and not turns:
                raise InputError("conversations: the list is empty")
            how.template.encode(turns, how.tokenizer)  # says what is wrong, where something else is
            raise InputError("conversations: the assistant says nothing, so there is nothing to learn")
        return *how.template.encode(turns, how.tokenizer), image
    if "instruction" not in item or "output" not in item:
        raise InputError(
            f"found {', '.join(map(str, item)) or 'nothing'}; "
            "an item has conversations, messages, or instruction and output"
        )
    for key in ("instruction", "output", "input"):
        if not isinstance(item.get(key, ""), str):
            raise InputError(f"{key}: got {item[key]!r:.60}, but it must be text")
    if not item["output"]:
        raise InputError("output: is empty, so there is nothing to learn")
    if how.dialog:
        question = item["instruction"] + (f"\n{item['input']}" if item.get("input") else "")
        template = how.template
    else:
        question = format_prompt(item["instruction"], item.get("input"), source.prompt_type)
        template = get_template("none")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": item["output"]}]
    return *template.encode(messages, how.tokenizer), image


def _image(item: Mapping[str, Any], source: Source) -> str | None:
    given = item.get("image")
    if given is None:
        return None
    if not isinstance(given, str):
        raise InputError(f"image: got {given!r:.60}, but it must be a path")
    path = os.path.join(source.root, given)
    if not os.path.isfile(path):
        raise InputError(f"image: {path}: no such file")
    return path


def _read(source: Source, how: _How, cached: bool, progress: bool, problems: list[str] | None) -> _Encoded:
    folder = source.path.parent / _CACHE / how.key(source)
    if cached and (folder / "rest.json").is_file():
        return _load(folder)
    encoded = _encode_all(source, how, progress, problems)
    if cached:
        _store(encoded, folder)
    return encoded


def _encode_all(source: Source, how: _How, progress: bool, problems: list[str] | None) -> _Encoded:
    ids: list[np.ndarray] = []
    learn: list[np.ndarray] = []
    truncated: list[bool] = []
    places: list[str] = []
    images: list[str | None] = []
    dropped = 0
    records: Iterable[tuple[str, Any]] = read_records(source.path)
    for place, item in tqdm(records, desc=source.path.name, unit=" items", disable=not progress, leave=False, delay=1):
        try:
            if isinstance(item, InputError):
                raise item
            try:
                item_ids, item_learn, image = encode_item(item, source, how)
            except InputError as error:
                raise InputError(f"{place}: {error}") from error
        except InputError as error:
            if problems is None:
                raise
            problems.append(str(error))
            continue
        cut = item_learn[: how.max_words]
        if not any(cut):
            dropped += 1
            continue
        ids.append(np.asarray(item_ids[: how.max_words], np.int32))
        learn.append(np.asarray(cut, bool))
        truncated.append(len(item_ids) > how.max_words)
        places.append(place)
        images.append(image)
    start = np.concatenate([[0], np.cumsum([len(i) for i in ids], dtype=np.int64)]).astype(np.int64)
    flat_ids = np.concatenate(ids) if ids else np.empty(0, np.int32)
    flat_learn = np.concatenate(learn) if learn else np.empty(0, bool)
    return _Encoded(flat_ids, flat_learn, start, np.asarray(truncated, bool), places, images, dropped)


def _arrays(encoded: _Encoded) -> Iterator[tuple[str, np.ndarray]]:
    for name in ("ids", "learn", "start", "truncated"):
        yield name, getattr(encoded, name)


def _store(encoded: _Encoded, folder: Path) -> None:
    """Whole or not at all; a cache that cannot be written is only slower."""
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        for name, array in _arrays(encoded):
            np.save(aside / f"{name}.npy", array, allow_pickle=False)
        rest = {"places": encoded.places, "images": encoded.images, "dropped": encoded.dropped}
        (aside / "rest.json").write_text(json.dumps(rest), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        log.warning("%s: what was encoded cannot be kept there (%s)", folder, error.strerror)


def _load(folder: Path) -> _Encoded:
    rest = json.loads((folder / "rest.json").read_text(encoding="utf-8"))
    names = ("ids", "learn", "start", "truncated")
    arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in names}
    return _Encoded(**arrays, **rest)


def _choose(items: int, ratio: float, seed: int, number: int) -> np.ndarray:
    """Which of a file's items are used: a random share, the same for the same seed."""
    if ratio == 1.0:
        return np.arange(items)
    count = max(1, round(items * ratio)) if items else 0
    return np.sort(np.random.default_rng([seed, number]).permutation(items)[:count])
