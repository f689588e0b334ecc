"""Data of a run whose rows say which items they are of, and the steps over them."""

from __future__ import annotations

import numpy as np

from accessory.data.dataset import Example
from accessory.train.dataloader import Schedule


class Items:
    """Data as the loader sees it: item i has i + 2 tokens, all of which are the number i."""

    def __init__(self, count: int, groups: int = 1) -> None:
        self.lengths = np.arange(count, dtype=np.int32) % 9 + 2
        self.groups = np.arange(count, dtype=np.int32) % groups

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, i: int) -> Example:
        n = int(self.lengths[i])
        return Example(ids=[i] * n, learn=[False] + [True] * (n - 1))


def schedule(data, rows=8, *, packing=False, epochs=1.0, max_steps=None, seed=0):
    return Schedule(data, rows=rows, max_words=16, packing=packing, seed=seed, epochs=epochs, max_steps=max_steps)
