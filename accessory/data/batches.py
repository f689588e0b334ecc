"""Which items a step learns from (`EpochPlan`), and the tensors made of them (`collate`).

A row is one item, or with packing as many items as fit. Items of a row are documents: they never attend to one another.
The items of a step follow from the data, the seed and the number of rows a step, whatever the number of ranks.

Legend: B rows, T tokens of the longest one, I images, 3 colours, P pixels each way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accessory.data.dataset import Example
from accessory.errors import InputError

IGNORED = -100
Row = tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Tensors of B rows of T tokens."""

    tokens_BT: Tensor  # int64
    labels_BT: Tensor  # int64: the next token where it is learnt and in the same document, else -100
    positions_BT: Tensor  # int64, from 0 in each document
    documents_BT: Tensor  # int64: 0, 1, 2 … in a row; padding has a number of its own
    counted_BT: Tensor  # bool: False for padding; positions of images count
    items: tuple[int, ...]
    pixels_I3PP: Tensor | None = None  # fp32, in the order of their positions (IMAGE_ID) in the flattened tokens
    whole: Batch | None = None  # of a part of the rows' tokens: all of them

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {name: function(t) for name, t in values.items() if isinstance(t, Tensor)}
        return replace(self, **mapped)

    def to(self, device: torch.device | str) -> Batch:
        return self._mapped(lambda t: t.to(device, non_blocking=True))

    def part(self, place_N: Tensor) -> Batch:
        """Only the tokens at these places of each row. A label may belong to a token that is no longer there."""
        names = ("tokens_BT", "labels_BT", "positions_BT", "documents_BT", "counted_BT")
        return replace(self, whole=self, **{name: getattr(self, name)[:, place_N] for name in names})

    def pin_memory(self) -> Batch:
        return self._mapped(lambda t: t.pin_memory())


def collate(
    rows: Sequence[Sequence[Example]],
    items: Sequence[int],
    pad_id: int = 0,
    length: int | None = None,
    pixels: Sequence[Tensor] = (),
    multiple: int = 1,
) -> Batch:
    """Put the documents of each row one after the other, and pad rows on the right to the longest one, or to `length`.

    multiple: of which a row's length is one; the longest row is padded too.
    pixels: (3, P, P) for each document that has an image, in the documents' order. An empty row is all padding.
    InputError when a row is longer than `length`, and when there are more or fewer images than documents with one.
    """
    wanted = sum(example.places > 0 for row in rows for example in row)
    if len(pixels) != wanted:
        raise InputError(f"pixels: got {len(pixels)} images, but there are places for {wanted}")
    longest = max((sum(len(e.ids) for e in row) for row in rows), default=0)
    T = -(-max(longest, 1) // multiple) * multiple if length is None else length
    if longest > T:
        raise InputError(f"length: got {T}, but there is a row of {longest} tokens")
    B = len(rows)
    tokens = np.full((B, T), pad_id, np.int64)
    labels = np.full((B, T), IGNORED, np.int64)
    positions, documents = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
    counted = np.zeros((B, T), bool)
    for b, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row):
            ids, n = np.asarray(example.ids, np.int64), len(example.ids)
            here = slice(at, at + n)
            tokens[b, here], positions[b, here], documents[b, here] = ids, np.arange(n), number
            counted[b, here] = True
            labels[b, at : at + n - 1] = np.where(np.asarray(example.learn[1:], bool), ids[1:], IGNORED)
            at += n
        documents[b, at:], positions[b, at:] = len(row), np.arange(T - at)
    tensors = [torch.from_numpy(a) for a in (tokens, labels, positions, documents, counted)]
    tokens_BT, labels_BT, positions_BT, documents_BT, counted_BT = tensors
    pixels_I3PP = torch.stack(list(pixels)) if pixels else None
    return Batch(tokens_BT, labels_BT, positions_BT, documents_BT, counted_BT, tuple(items), pixels_I3PP)


class EpochPlan:
    """One epoch, cut into steps of exactly `rows_per_step` rows, each of one group; every item comes once.

    With packing, items are taken in a random order, each is put where it fits best, and the rows are shuffled. Without
    packing a row is one item, a step holds items of similar length, as in the original project, and the steps are
    shuffled. Where a group does not fill its steps, one of them ends in empty rows.

    lengths (N,): tokens of each item, at most `max_words`, else InputError. groups (N,): its group.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        groups: Sequence[int] | np.ndarray,
        *,
        rows_per_step: int,
        max_words: int,
        packing: bool,
        seed: int,
        epoch: int,
    ) -> None:
        lengths, groups = np.asarray(lengths, np.int64), np.asarray(groups, np.int64)
        if len(lengths) and lengths.max() > max_words:
            raise InputError(f"max_words: got {max_words}, but there is an item of {lengths.max()} tokens")
        random = np.random.default_rng([seed, epoch])
        steps: list[list[Row]] = []
        for group in np.unique(groups):
            order = random.permutation(np.flatnonzero(groups == group))
            if packing:
                packed = _packed(order.tolist(), lengths[order].tolist(), max_words)
                rows = [packed[i] for i in random.permutation(len(packed))]
                short = len(rows) // rows_per_step
            else:
                # A stable sort of a random order: items of equal length come in another order in every epoch.
                rows = [(i,) for i in order[np.argsort(lengths[order], kind="stable")].tolist()]
                # The step that is not filled may be any, so that steps are cut elsewhere in every epoch.
                short = int(random.integers(len(rows) // rows_per_step + 1))
            steps += _cut(rows, rows_per_step, short)
        self._steps = [steps[i] for i in random.permutation(len(steps))]
        self._tokens = int(lengths.sum())
        self._room = len(self._steps) * rows_per_step * max_words

    @property
    def steps(self) -> int:
        return len(self._steps)

    def rows(self, step: int) -> list[Row]:
        """The rows of a step, counted from 0: tuples of items. Rows that no item is left for are empty."""
        return self._steps[step]

    @property
    def fill(self) -> float:
        """The share of all steps' positions, `rows_per_step` × `max_words` each, that hold a token."""
        return self._tokens / self._room if self._room else 0.0


def _cut(rows: list[Row], size: int, short: int) -> list[list[Row]]:
    """Cut rows into steps of `size`. Step number `short` takes the remainder and is filled up with empty rows."""
    left = len(rows) % size
    at, steps = 0, []
    for number in range(-(-len(rows) // size)):
        take = left if left and number == short else size
        steps.append(rows[at : at + take] + [()] * (size - take))
        at += take
    return steps


def _packed(items: Sequence[int], lengths: Sequence[int], max_words: int) -> list[Row]:
    """Best fit: each item goes to the fullest row that still has room for it.

    `waiting` holds rows by the room that they have left, and bit n of `rooms` is set while `waiting[n]` holds any. So
    the tightest row for an item is the lowest set bit from its length on.
    """
    rows: list[list[int]] = []
    waiting: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0
    for item, length in zip(items, lengths, strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = waiting[room].pop()
            if not waiting[room]:
                rooms ^= 1 << room
        else:
            room, row = max_words, len(rows)
            rows.append([])
        rows[row].append(item)
        if room > length:
            waiting[room - length].append(row)
            rooms |= 1 << (room - length)
    return [tuple(row) for row in rows]
