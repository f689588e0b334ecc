"""What `accessory data check` finds: `Checked`, which `data_view` shows and `as_json` tells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from accessory.commands.data_choices import Choices
from accessory.commands.training_speed import Speed
from accessory.data.dataset import FinetuneData
from accessory.data.tokenizer import Tokenizer
from accessory.train.dataloader import Schedule
from accessory.vision_config import IMAGE_ID

PREVIEWED = 2  # items shown of each group
TOKENS = 400  # tokens shown of an item


@dataclass(frozen=True)
class Checked:
    """A list of data, checked. misplaced: the result of `check_bos`."""

    path: str
    problems: list[str]
    data: FinetuneData | None = None  # None: no item can be used
    misplaced: list[str] | None = None
    schedule: Schedule | None = None  # None for items that are held out
    speed: Speed | None = None  # None where nobody knows


@dataclass(frozen=True)
class Count:
    """What a run takes of a file, of the files of a type, or of all. left_out: by the cut to `max_words`."""

    file: str | None  # None: of several files
    type: str | None  # None: of several types
    items: int
    tokens: int
    cut: int
    learnt: int  # tokens
    left_out: int | None = None  # None: counted by file alone
    of: int | None = None  # items of the file, where a ratio takes a share of them


def counts(data: FinetuneData) -> Iterator[Count]:
    """The counts of each file, then of each type and of all, where there are several."""
    learnt = data.learnt_tokens()

    def count(file: str | None, type_: str | None, own: np.ndarray, *more: int | None) -> Count:
        cut = int((data.whole[own] > data.max_words).sum())
        return Count(file, type_, int(own.sum()), int(data.lengths[own].sum()), cut, int(learnt[own].sum()), *more)

    for number, file in enumerate(data.files):
        own = data.file_of == number
        dropped = len(file.encoded.lines) - len(file.broken) - int(own.sum())
        of = None if file.taken == file.items else file.items
        yield count(str(file.source.path), file.source.group, own, dropped, of)
    if len(data.group_names) > 1:
        for number, name in enumerate(data.group_names):
            yield count(None, name, data.groups == number)
    if len(data.files) > 1:
        yield count(None, None, np.ones(len(data), bool), data.dropped)


@dataclass(frozen=True)
class Lengths:
    """The tokens of items before any cut. bins: (least, most, items); each is twice as wide as the one before."""

    median: float
    of_99_in_100: float
    longest: int
    bins: list[tuple[int, int, int]] = field(default_factory=list)


def lengths(data: FinetuneData) -> Lengths:
    powers = np.floor(np.log2(np.maximum(data.whole, 1))).astype(int)
    numbers = np.bincount(powers).tolist()
    bins = [(2**power, 2 ** (power + 1) - 1, numbers[power]) for power in range(int(powers.min()), len(numbers))]
    middle, most = np.percentile(data.whole, [50, 99]).tolist()
    return Lengths(middle, most, int(data.whole.max()), bins)


@dataclass(frozen=True)
class Rows:
    """The rows of the first epoch. fill: the share of their tokens that items take."""

    steps: int
    full: int
    items_a_row: float
    fill: float


def rows(schedule: Schedule) -> Rows:
    first = schedule.plans[0]
    every = [row for step in range(first.steps) for row in first.rows(step) if row]
    return Rows(first.steps, len(every), sum(map(len, every)) / max(len(every), 1), first.fill)


def tokens_in_all(data: FinetuneData, schedule: Schedule) -> int:
    """Tokens of the whole run, each item counted as often as it is seen."""
    return sum(int(data.lengths[i]) for step in range(schedule.steps) for row in schedule.rows(step) for i in row)


@dataclass(frozen=True)
class Images:
    """Items with an image, of all items, and the image files. left_out: items whose image cannot be used."""

    items: int
    of: int
    files: int
    positions: int  # that they take, of the tokens of all items
    left_out: int


def images(data: FinetuneData) -> Images | None:
    """None where no item has an image."""
    items = sum(len(f.encoded.images) for f in data.files)
    paths = {(f.source.root, image) for f in data.files for image in f.encoded.images.values()}
    every = sum(len(f.encoded.lines) for f in data.files)
    return Images(items, every, len(paths), int(data.places.sum()), data.broken) if items else None


def previewed(data: FinetuneData, group: int) -> list[int]:
    """The items of a group that are shown: its first ones."""
    return np.flatnonzero(data.groups == group)[:PREVIEWED].tolist()


# --------------------------------------------------------------------------- for JSON


def as_json(choices: Choices, tokenizer: Tokenizer, checked: dict[str, Checked]) -> dict[str, Any]:
    """What was found, as plain values for JSON: all problems, and of each group the first items."""
    return {
        "ok": not any(one.problems for one in checked.values()),
        "tokenizer": {"path": str(tokenizer.path), "kind": tokenizer.kind, "ids": tokenizer.vocab_size},
        "template": choices.template or "default",
        "max_words": choices.max_words,
        **{title: _as_json(one, choices, tokenizer) for title, one in checked.items()},
    }


def _as_json(one: Checked, choices: Choices, tokenizer: Tokenizer) -> dict[str, Any]:
    told: dict[str, Any] = {"path": one.path, "problems": one.problems}
    data, schedule = one.data, one.schedule
    if data is None:
        return told
    told |= {"counts": [asdict(count) for count in counts(data)], "tokens_of_an_item": asdict(lengths(data))}
    if schedule is not None:
        every, speed = tokens_in_all(data, schedule), one.speed
        told["steps"] = {
            **asdict(rows(schedule)),
            "rows_a_step": choices.rows,
            "packing": choices.packing,
            "epochs": choices.epochs,
            "steps_in_all": schedule.steps,
            "tokens_in_all": every,
            "seconds": None if speed is None else every / speed.tokens_per_second,
        }
    seen = images(data)
    told["images"] = None if seen is None else asdict(seen)
    told["bos"] = None if one.misplaced is None else not one.misplaced
    shown = [item for group in range(len(data.group_names)) for item in previewed(data, group)]
    return {**told, "examples": [_example(data, item, tokenizer) for item in shown]}


def _example(data: FinetuneData, item: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """An item as the model reads it, in pieces that are learnt or not."""
    example = data.example(item)
    words = [pair for pair in zip(example.ids, example.learn, strict=True) if pair[0] != IMAGE_ID][:TOKENS]
    pieces: list[tuple[list[int], bool]] = []
    for token, learnt in words:
        if not pieces or pieces[-1][1] != learnt:
            pieces.append(([], learnt))
        pieces[-1][0].append(token)
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    told, begun = [], False
    for ids, learnt in pieces:
        text = b""
        for token in ids:
            text += names[token].encode() if token in names else tokenizer.token_bytes(token, begun)
            begun = begun or token not in names
        told.append({"text": text.decode("utf-8", "replace"), "learnt": learnt})
    return {
        "where": data.where(item),
        "type": data.group_names[data.groups[item]],
        "tokens": len(example.ids),
        "cut": example.truncated,
        "image": example.image,
        "pieces": told,
    }
