"""Means of per-layer values over time, in bounded memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
COLUMNS = 200


class LayerBins:
    """Means of per-layer values over time, at most `columns` of them, however many steps come.

    Each holds `width` steps, which doubles when they become too many. Arrays are (layers, values).
    """

    def __init__(self, columns: int = COLUMNS) -> None:
        self.columns, self.width = columns, 1
        self._sums: list[Floats] = []
        self._counts: list[int] = []
        self._first: list[int] = []

    def add(self, step: int, values: Floats) -> None:
        """Add a step's values; those of another shape than the first ones are passed over."""
        if self._sums and self._sums[0].shape != values.shape:
            return
        if self._sums and self._counts[-1] < self.width:
            self._sums[-1] = self._sums[-1] + values
            self._counts[-1] += 1
            return
        if len(self._sums) == self.columns:
            self._merge()
            return self.add(step, values)
        self._sums.append(values)
        self._counts.append(1)
        self._first.append(step)

    def _merge(self) -> None:
        self.width *= 2
        pairs = range(0, len(self._sums), 2)
        self._sums = [sum(self._sums[i + 1 : i + 2], self._sums[i]) for i in pairs]
        self._counts = [sum(self._counts[i : i + 2]) for i in pairs]
        self._first = self._first[::2]

    def __len__(self) -> int:
        return len(self._sums)

    def means(self) -> Floats:
        """(columns, layers, values)"""
        return np.stack([total / count for total, count in zip(self._sums, self._counts, strict=True)])

    def steps(self) -> Floats:
        """The first step of each column."""
        return np.array(self._first, float)
