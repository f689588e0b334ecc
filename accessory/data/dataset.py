"""Finetuning data: from a YAML that lists files to items of token ids, with what a model learns of each."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from accessory.data import token_cache
from accessory.data.encoding import Encoded, Encoding, encode_source, image_path
from accessory.data.image_check import broken_headers
from accessory.data.image_tokens import image_start, insert_image_tokens
from accessory.data.images import MAX_PIXELS
from accessory.data.records import Records, Source, open_records, place, read_meta
from accessory.data.templates import get_template
from accessory.data.tokenizer import Tokenizer
from accessory.errors import InputError, listed

log = logging.getLogger(__name__)

_SHOWN = 3  # broken images that a warning names


@dataclass(frozen=True)
class Example:
    """One item, encoded."""

    ids: list[int]
    learn: list[bool]  # for each id, whether a model learns to write it
    truncated: bool = False
    image: str | None = None
    places: int = 0  # how many of `ids` are the image's positions (IMAGE_ID)


@dataclass(frozen=True)
class DataFile:
    """A file of the META list: how many items it has, how many of them its `ratio` selects, and those, encoded."""

    source: Source
    items: int
    taken: int
    encoded: Encoded
    broken: frozenset[int] = frozenset()  # encoded items left out because of their images


class FinetuneData:
    """The items of all files of a META list, in order, cut on the right to `max_words` tokens.

    An item with an image has `image_tokens` more tokens, the image's positions (IMAGE_ID), at its beginning or right
    behind `bos_id`. They are never learnt, and never cut.

    Attributes of the whole: `files`; `group_names`, the types of files; `truncated`, how many items were cut;
    `dropped`, how many were left out because the cut left nothing to learn in them; `broken`, how many were left out
    because of their images.
    Attributes with an entry for each item (N,): `lengths` and `whole`, its tokens after and before the cut, int32;
    `places`, how many of them are an image's positions, int32; `groups`, its number in `group_names`, int32 (items of a
    group share batches); `file_of`, its number in `files`; `index`, which of the file's encoded items it is.
    """

    def __init__(
        self, files: Sequence[DataFile], max_words: int, image_tokens: int = 0, bos_id: int | None = None
    ) -> None:
        self.files = list(files)
        self.max_words, self.image_tokens, self.bos_id = max_words, image_tokens, bos_id
        self.group_names = list(dict.fromkeys(f.source.group for f in files))
        kept = [self._kept(f) for f in files]
        self.broken = sum(len(f.broken) for f in files)
        self.dropped = sum(len(f.encoded.first) - len(k) for f, k in zip(files, kept, strict=True)) - self.broken
        self.index = np.concatenate(kept)
        self.file_of = np.repeat(np.arange(len(files), dtype=np.int32), [len(k) for k in kept])
        self.places = np.concatenate([self._places(f)[k] for f, k in zip(files, kept, strict=True)])
        self.whole = np.concatenate([np.diff(f.encoded.start)[k] for f, k in zip(files, kept, strict=True)])
        self.whole = self.whole.astype(np.int32) + self.places
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
        image_tokens: int | None = 0,
        broken_images: Literal["fail", "skip"] | None = "fail",
        max_pixels: int = MAX_PIXELS,
        once: Callable[[Callable[[], Any]], Any] = lambda look: look(),
    ) -> FinetuneData:
        """Read and encode every item.

        max_words: tokens that an item may have; longer ones are cut on the right.
        template: the template of dialogues, by default "default"; "tokenizer" is the tokenizer's own.
        dialog: treat single turns as dialogues of two messages; without it, they are alpaca's prompts.
        prompt_type: the prompt of single turns, with or without `dialog`. A file's own prompt_type wins.
        cache_ann_on_disk: keep the encoded items in `cache_dir`, by default beside the files, and read them from there
        until something changes that they depend on.
        seed: decides which items a file's `ratio` selects.
        problems: a list to which a line is added for each item that cannot be used; such items are left out.
        image_tokens: positions of an image. 0: an item with an image is an InputError. None: nobody knows how many, so
        images take none.
        broken_images: what becomes of items whose image cannot be used, as far as its header tells: "fail", or "skip",
        which leaves them out with a warning. None: no image is opened.
        max_pixels: the largest image that can be used.
        once: calls its argument in one of several processes, and returns the result in all of them. Images are looked
        at through it.

        Without `problems`, raises InputError with file and line of the first item that cannot be used, and warns of how
        many items are cut and how many left out.
        """
        sources = [replace(s, prompt_type=s.prompt_type or prompt_type) for s in read_meta(meta)]
        how = Encoding(tokenizer, get_template(template or "default", tokenizer), dialog)
        folder = None if cache_dir is None else Path(cache_dir)
        files: list[DataFile] = []
        told: list[str] = []
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
                # Which items a ratio selects depends on the seed and on the file's place in the list.
                selection = "" if source.ratio == 1 else f"{source.ratio} {seed} {number}"
                kept = token_cache.cache_folder(source, how, selection, folder)
            encoded = token_cache.load(kept) if kept is not None else None
            if encoded is None:
                encoded = encode_source(source, records, chosen, how, problems=problems, progress=progress)
                if kept is not None and not (problems and len(problems) > before) and token_cache.store(encoded, kept):
                    encoded = token_cache.load(kept) or encoded
            found: dict[int, str] = {}
            if encoded.images and image_tokens == 0:
                _refuse_images(encoded, records, problems)
            elif encoded.images and broken_images is not None:
                first_only = broken_images == "fail" and problems is None
                look = partial(_broken_images, encoded, source, records, max_pixels, first_only, progress)
                found = once(look)
                if problems is not None:
                    problems += found.values()
                told += found.values()
            files.append(DataFile(source, len(records), len(chosen), encoded, frozenset(found)))
        if not sum(len(f.encoded.lines) - len(f.broken) for f in files):
            told = problems or told
            if told:
                more = f" (and {len(told) - 1} more like it)" if len(told) > 1 else ""
                raise InputError(f"{told[0]}{more}")
            raise InputError(f"data_config: there are no items in {', '.join(str(s.path) for s in sources)}")
        data = cls(files, max_words, image_tokens or 0, tokenizer.bos_id)
        if problems is None:
            data._warn(told)
        if not len(data):
            least = f", of which an image takes {image_tokens}" if image_tokens and max(map(_images, files)) else ""
            raise InputError(
                f"max_words: got {max_words}, but no item has anything to learn in so few tokens{least}; give more"
            )
        return data

    def _warn(self, told: Sequence[str]) -> None:
        if told:
            shown = listed(told, _SHOWN, between="; ")
            log.warning("broken_images: %d of %d items are left out: %s", len(told), len(told) + len(self), shown)
        if self.truncated:
            log.warning(
                "max_words: %d of %d items are longer than %d and cut", self.truncated, len(self), self.max_words
            )
        if self.dropped:
            log.warning(
                "max_words: %d items are left out: their first %d tokens hold nothing to learn",
                self.dropped,
                self.max_words,
            )

    def __len__(self) -> int:
        return len(self.index)

    def example(self, item: int) -> Example:
        encoded, at = self._place(item)
        begin, places = int(encoded.start[at]), int(self.places[item])
        here = slice(begin, begin + int(self.lengths[item]) - places)
        ids, learn = encoded.ids[here].tolist(), encoded.learn[here].tolist()
        image = encoded.images.get(at)
        if image is not None:
            image = image_path(image, self.source_of(item))
        if places:
            start = image_start(ids, self.bos_id)
            learn[start:start] = [False] * places
            ids = insert_image_tokens(ids, places, self.bos_id)
        return Example(ids, learn, bool(self.whole[item] > self.max_words), image, places)

    def where(self, item: int) -> str:
        """An item's file and line."""
        encoded, at = self._place(item)
        return place(self.files[self.file_of[item]].source.path, int(encoded.lines[at]))

    def learnt_tokens(self) -> np.ndarray:
        """How many tokens of each item are learnt, int64 (N,)."""
        out = np.zeros(len(self), np.int64)
        for number, file in enumerate(self.files):
            own = self.file_of == number
            begin = file.encoded.start[:-1][self.index[own]]
            spans = np.stack([begin, begin + self.lengths[own] - self.places[own]], axis=1).ravel()
            if len(spans):
                # A sum runs from each bound to the next, and every other one lies between items.
                # The last bound may be the end of the array, which `reduceat` does not take.
                learn = file.encoded.learn
                sums = np.add.reduceat(learn, spans[: -1 if spans[-1] == len(learn) else None])
                out[own] = sums[::2]
        return out

    def source_of(self, item: int) -> Source:
        return self.files[self.file_of[item]].source

    def fingerprint(self) -> str:
        """A digest of all items in their order. Equal data have equal digests, whatever their files are called."""
        digest = hashlib.sha256(self.lengths.tobytes() + self.groups.tobytes() + self.index.tobytes())
        for file in self.files:
            digest.update(file.encoded.ids.data)
            digest.update(file.encoded.learn.data)
            if self.image_tokens and file.encoded.images:
                digest.update(json.dumps([self.image_tokens, sorted(file.encoded.images.items())]).encode())
        return digest.hexdigest()

    def _place(self, item: int) -> tuple[Encoded, int]:
        return self.files[self.file_of[item]].encoded, int(self.index[item])

    def _places(self, file: DataFile) -> np.ndarray:
        """How many positions an image takes in each of a file's encoded items (N,)."""
        places = np.zeros(len(file.encoded.lines), np.int32)
        places[list(file.encoded.images)] = self.image_tokens
        return places

    def _kept(self, file: DataFile) -> np.ndarray:
        # An item has something to learn if its first id that is learnt is among its first max_words ids.
        keep = file.encoded.first + self._places(file) < self.max_words
        keep[list(file.broken)] = False
        return np.flatnonzero(keep)


def _chosen(items: int, ratio: float, seed: Sequence[int]) -> np.ndarray:
    """The indices of a file's items that are used: a random share, the same for the same seed."""
    if ratio == 1:
        return np.arange(items)
    count = max(1, round(items * ratio)) if items else 0
    return np.sort(np.random.default_rng(seed).permutation(items)[:count])


def _images(file: DataFile) -> int:
    return len(file.encoded.images)


def _refuse_images(encoded: Encoded, records: Records, problems: list[str] | None) -> None:
    """Report items with images to a run that takes no images: it must not mistake them for text."""
    where = records.place(int(encoded.lines[min(encoded.images)]))
    more = f" (and {len(encoded.images) - 1} items more)" if len(encoded.images) > 1 else ""
    message = (
        f"{where}: image: this item has one{more}, and the model looks at none; give a llama_type that does, as "
        "mixtral_ens, and no_visual=false, or take image out of the items"
    )
    if problems is None:
        raise InputError(message)
    problems.append(message)


def _broken_images(
    encoded: Encoded, source: Source, records: Records, max_pixels: int, first_only: bool, progress: bool
) -> dict[int, str]:
    """Item -> what is wrong with its image, with file and line. With `first_only`, InputError for the first one."""
    showing: dict[str, list[int]] = {}
    for item, image in sorted(encoded.images.items()):
        showing.setdefault(image_path(image, source), []).append(item)
    found: dict[int, str] = {}
    for path, error in broken_headers(showing, max_pixels=max_pixels, progress=progress):
        for item in showing[path]:
            found[item] = f"{records.place(int(encoded.lines[item]))}: image: {error}"
            if first_only:
                raise InputError(f"{found[item]}; broken_images=skip leaves such items out")
    return dict(sorted(found.items()))
