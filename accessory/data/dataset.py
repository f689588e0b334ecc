"""Finetuning data: from a YAML that lists files to items of token ids, each knowing what of it is learnt."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from accessory.data import token_cache
from accessory.data.conversation import get_template
from accessory.data.encoding import Encoded, Encoding, encode_source, find_image
from accessory.data.records import Records, Source, open_records, place, read_meta
from accessory.data.tokenizer import Tokenizer
from accessory.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One item, encoded."""

    ids: list[int]
    learn: list[bool]  # of each id, whether a model learns to write it
    truncated: bool = False
    image: str | None = None


@dataclass(frozen=True)
class DataFile:
    """A file of the META list: how many items it has, how many of them its `ratio` takes, and these, encoded."""

    source: Source
    items: int
    taken: int
    encoded: Encoded


class FinetuneData:
    """The items of all files of a META list, in order, cut on the right to `max_words` tokens.

    Attributes: `files`; `group_names`, the files' types; of each item: `lengths` and `whole` (tokens with and without
    the cut, int32), `groups` (number in `group_names`, int32; items of a group share batches), `file_of` and `index`
    (number in `files`, and which of the file's encoded items it is); `truncated`, how many items were cut, and
    `dropped`, how many more were left out, because the cut left nothing to learn of them.
    """

    def __init__(self, files: Sequence[DataFile], max_words: int) -> None:
        self.files = list(files)
        self.max_words = max_words
        self.group_names = list(dict.fromkeys(f.source.group for f in files))
        # With max_words ids, the last one that can be learnt is number max_words - 1.
        kept = [np.flatnonzero(f.encoded.first < max_words) for f in files]
        self.dropped = sum(len(f.encoded.first) - len(k) for f, k in zip(files, kept, strict=True))
        self.index = np.concatenate(kept)
        self.file_of = np.repeat(np.arange(len(files), dtype=np.int32), [len(k) for k in kept])
        self.whole = np.concatenate([np.diff(f.encoded.start)[k] for f, k in zip(files, kept, strict=True)])
        self.whole = self.whole.astype(np.int32)
        self.lengths = np.minimum(self.whole, np.int32(max_words))
        numbers = [self.group_names.index(f.source.group) for f in files]
        self.groups = np.asarray(numbers, np.int32)[self.file_of]
        self.truncated = int((self.whole > max_words).sum())

    @classmethod
    def open(
        cls,
        meta: str | Path | Mapping[str, Any],
        tokenizer: Tokenizer,
        *,
        max_words: int,
        template: str | None = None,
        dialog: bool = True,
        prompt_type: str | None = None,
        cache_ann_on_disk: bool = False,
        cache_dir: str | Path | None = None,
        seed: int = 0,
        progress: bool = True,
        problems: list[str] | None = None,
    ) -> FinetuneData:
        """Read and encode every item.

        max_words: tokens an item may have; longer ones are cut on the right. template: of dialogues, by default
        "default"; "tokenizer" is the tokenizer's own. dialog: single turns are dialogues of two messages; without it,
        they are alpaca's prompts. prompt_type: of single turns, either way; what their file names wins.
        cache_ann_on_disk: keep what was encoded in `cache_dir`, by default beside the files, and take it from there as
        long as nothing has changed that it depends on. seed: decides which items a file's `ratio` takes.

        InputError names file and line of the first item that cannot be used; given a list of `problems`, all of them
        are told there and left out. Else a warning tells how many items are cut, and how many dropped.
        """
        sources = [replace(s, prompt_type=s.prompt_type or prompt_type) for s in read_meta(meta)]
        how = Encoding(tokenizer, get_template(template or "default", tokenizer), dialog)
        folder = None if cache_dir is None else Path(cache_dir)
        files = []
        for number, source in enumerate(sources):
            try:
                records = open_records(source.path)
            except InputError as error:
                if problems is None:
                    raise
                problems.append(str(error))
                continue
            chosen = _chosen(len(records), source.ratio, (seed, number))
            before = 0 if problems is None else len(problems)
            kept = None
            if cache_ann_on_disk:
                # A share depends on the seed and on the file's place in the list, all of a file on nothing.
                selection = "" if source.ratio == 1 else f"{source.ratio} {seed} {number}"
                kept = token_cache.cache_folder(source, how, selection, folder)
            encoded = token_cache.load(kept) if kept is not None else None
            if encoded is not None:
                _check_images(encoded, source, records, problems)
            else:
                encoded = encode_source(source, records, chosen, how, problems=problems, progress=progress)
                if kept is not None and not (problems and len(problems) > before) and token_cache.store(encoded, kept):
                    encoded = token_cache.load(kept) or encoded
            files.append(DataFile(source, len(records), len(chosen), encoded))
        if not sum(len(f.encoded.lines) for f in files):
            if problems:
                more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
                raise InputError(f"{problems[0]}{more}")
            raise InputError(f"data_config: there are no items in {', '.join(str(s.path) for s in sources)}")
        data = cls(files, max_words)
        if data.truncated and problems is None:
            log.warning("max_words: %d of %d items are longer than %d and cut", data.truncated, len(data), max_words)
        if data.dropped and problems is None:
            log.warning(
                "max_words: %d items are left out: their first %d tokens hold nothing to learn", data.dropped, max_words
            )
        if not len(data):
            raise InputError(f"max_words: got {max_words}, but no item has anything to learn in so few tokens")
        return data

    def __len__(self) -> int:
        return len(self.index)

    def example(self, item: int) -> Example:
        encoded, at = self._place(item)
        begin = int(encoded.start[at])
        here = slice(begin, begin + int(self.lengths[item]))
        image = encoded.images.get(at)
        if image is not None:
            image = find_image(image, self.files[self.file_of[item]].source)
        truncated = bool(self.whole[item] > self.max_words)
        return Example(encoded.ids[here].tolist(), encoded.learn[here].tolist(), truncated, image)

    def where(self, item: int) -> str:
        """The item's file and line."""
        encoded, at = self._place(item)
        return place(self.files[self.file_of[item]].source.path, int(encoded.lines[at]))

    def source_of(self, item: int) -> Source:
        return self.files[self.file_of[item]].source

    def fingerprint(self) -> str:
        """A digest of all items in order: equal for equal data, whatever the files are called."""
        digest = hashlib.sha256(self.lengths.tobytes() + self.groups.tobytes() + self.index.tobytes())
        for file in self.files:
            digest.update(file.encoded.ids.data)
            digest.update(file.encoded.learn.data)
        return digest.hexdigest()

    def _place(self, item: int) -> tuple[Encoded, int]:
        return self.files[self.file_of[item]].encoded, int(self.index[item])


def _chosen(items: int, ratio: float, seed: Sequence[int]) -> np.ndarray:
    """Which of a file's items are used: a random share, the same for the same seed."""
    if ratio == 1:
        return np.arange(items)
    count = max(1, round(items * ratio)) if items else 0
    return np.sort(np.random.default_rng(seed).permutation(items)[:count])


def _check_images(encoded: Encoded, source: Source, records: Records, problems: list[str] | None) -> None:
    """Images may have gone since the file was encoded."""
    for item, image in encoded.images.items():
        try:
            find_image(image, source)
        except InputError as error:
            message = f"{records.place(int(encoded.lines[item]))}: {error}"
            if problems is None:
                raise InputError(message) from error
            problems.append(message)
