"""Which items a step learns from, and the tensors made of them.

Rows are made of items: one each, or with packing as many documents as fit, which never see one another. What a step
holds follows from the data, the seed and the number of rows a step; it knows nothing of ranks.

Legend: B rows, T tokens of the longest one.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from accessory.data.dataset import Example

IGNORED = -100
Row = tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Tensors of B rows of T tokens."""

    tokens_BT: Tensor  # int64
    labels_BT: Tensor  # int64: the next token, where it is learnt and of the same document; else -100
    positions_BT: Tensor  # int64, from 0 in each document
    documents_BT: Tensor  # int64: 0, 1, 2 … in a row; padding has a number of its own
    counted_BT: Tensor  # bool: no padding
    items: tuple[int, ...]

    def _mapped(self, function: object) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "items"}
        return replace(self, **{name: function(t) for name, t in tensors.items()})  # type: ignore[operator]

    def to(self, device: torch.device | str) -> Batch:
        return self._mapped(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._mapped(lambda t: t.pin_memory())


def collate(
    rows: Sequence[Sequence[Example]], items: Sequence[int], pad_id: int = 0, length: int | None = None
) -> Batch:
    """Lay documents one behind the other in each row, padded on the right to the longest row, or to `length`."""
    T = max([sum(len(e.ids) for e in row) for row in rows], default=0)
    T = max(T, 1) if length is None else length
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
    return Batch(tokens_BT, labels_BT, positions_BT, documents_BT, counted_BT, tuple(items))


class EpochPlan:
    """One epoch, cut into steps of exactly `rows_per_step` rows, each of one group.

    With packing, items are taken in a random order and put where they fit best; without, rows of similar length come
    together. Every item comes once. Where a group does not fill its last step, empty rows do.
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
        random = np.random.default_rng([seed, epoch])
        steps: list[list[Row]] = []
        for group in np.unique(groups):
            order = random.permutation(np.flatnonzero(groups == group))
            if packing:
                rows = _packed(order, lengths, max_words)
                rows = [rows[i] for i in random.permutation(len(rows))]
            else:
                rows = [(int(i),) for i in _by_length(order, lengths, rows_per_step)]
            chunks = [rows[i : i + rows_per_step] for i in range(0, len(rows), rows_per_step)]
            # A short last step is filled with rows that hold nothing, so that every rank has its share of rows.
            steps += [chunk + [()] * (rows_per_step - len(chunk)) for chunk in chunks]
        self._steps = [steps[i] for i in random.permutation(len(steps))]

    @property
    def steps(self) -> int:
        return len(self._steps)

    def rows(self, step: int) -> list[Row]:
        return self._steps[step]


def _packed(order: np.ndarray, lengths: np.ndarray, max_words: int) -> list[Row]:
    """Best fit: each item goes to the fullest open row that still has room for it."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    for item in order.tolist():
        n = int(lengths[item])
        at = bisect.bisect_left(open_rows, (n, -1))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        else:
            room, row = max_words, len(rows)
            rows.append([])
        rows[row].append(item)
        if room - n > 0:
            bisect.insort(open_rows, (room - n, row))
    return [tuple(row) for row in rows]


def _by_length(order: np.ndarray, lengths: np.ndarray, rows_per_step: int) -> np.ndarray:
    """Sort stretches of many steps by length, so that a step pads little while an epoch stays mixed."""
    stretch = rows_per_step * 50
    parts = [order[i : i + stretch] for i in range(0, len(order), stretch)]
    return np.concatenate([p[np.argsort(lengths[p], kind="stable")[::-1]] for p in parts])
