"""Decoding steps replayed as CUDA graphs (`ops.graphs`).

A graph has a fixed number of rows, a bucket. A step with fewer sequences fills the other rows with padding, which
writes to page 0. Collectives between ranks are inside; all ranks replay the same bucket.

Legend: B sequences, C columns of a step's numbers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from accessory.limits import GRAPH_BUCKETS
from accessory.ops.graphs import Graphs, possible


class DecodeGraphs:
    """The graphs of one network, captured when first needed.

    forward: computes logits (B, V) from a step's numbers (B, C) int32 on the device. fits: whether so many rows run
    without the host. Both are told whether a row takes one of several adapters: such steps have graphs of their own, so
    that others do not pay for adapters. padding: the numbers (C,) of a row that no sequence has.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, bool], Tensor],
        fits: Callable[[int, bool], bool],
        padding_C: np.ndarray,
        device: torch.device,
        most: int,
    ) -> None:
        self._forward, self._fits, self._padding_C = forward, fits, padding_C
        self.buckets = [b for b in GRAPH_BUCKETS if b < most] + [most] if possible(device) else []
        self._fit: dict[tuple[int, bool], bool] = {}
        self._graphs: Graphs[Tensor] = Graphs(device)

    def bucket(self, sequences: int, adapted: bool) -> int | None:
        """The rows of the graph for a step of so many sequences; None where such a step needs the host."""
        bucket = next((b for b in self.buckets if b >= sequences), None)
        if bucket is None:
            return None
        if (bucket, adapted) not in self._fit:
            self._fit[bucket, adapted] = self._fits(bucket, adapted)
        return bucket if self._fit[bucket, adapted] else None

    def step(self, bucket: int, numbers_BC: np.ndarray, adapted: bool) -> Tensor:
        """Logits (bucket, V) of a step, valid until the next one."""
        rows_BC = np.tile(self._padding_C, (bucket, 1))
        rows_BC[: len(numbers_BC)] = numbers_BC
        key, host_BC = (bucket, adapted), torch.from_numpy(rows_BC)
        return self._graphs.run(key, lambda input_BC: self._forward(input_BC, adapted), host_BC)

    def again(self, bucket: int, adapted: bool) -> Callable[[], None] | None:
        """Replays the last step of so many rows, for measurements; None where there was none."""
        return self._graphs.again((bucket, adapted))
