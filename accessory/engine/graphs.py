"""Decoding steps replayed as CUDA graphs: one launch a step instead of hundreds, and no compiler.

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


class DecodeGraphs:
    """The graphs of one network, captured when first needed, in one memory pool.

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
        self._forward, self._fits, self._padding_C, self._device = forward, fits, padding_C, device
        self.buckets = [b for b in GRAPH_BUCKETS if b < most] + [most] if device.type == "cuda" else []
        self._fit: dict[tuple[int, bool], bool] = {}
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle() if self.buckets else None

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
        host_BC = torch.from_numpy(rows_BC).pin_memory()
        if (bucket, adapted) not in self._graphs:
            self._graphs[bucket, adapted] = self._capture(host_BC.to(self._device), adapted)
        graph, input_BC, logits_BV = self._graphs[bucket, adapted]
        input_BC.copy_(host_BC, non_blocking=True)
        graph.replay()
        return logits_BV

    def again(self, bucket: int, adapted: bool) -> Callable[[], None] | None:
        """Replays the last step of so many rows, for measurements; None where there was none."""
        made = self._graphs.get((bucket, adapted))
        return None if made is None else made[0].replay

    def _capture(self, input_BC: Tensor, adapted: bool) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        # Kernels are compiled and libraries started on first use, which a capture cannot hold. Running a step several
        # times is harmless: it writes the same keys to the same slots.
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward(input_BC, adapted)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # A stream of its own, because torch's default one belongs to the card of the process's first capture.
        # thread_local: another thread, as NCCL's watchdog, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, stream=side, capture_error_mode="thread_local"):
            logits_BV = self._forward(input_BC, adapted)
        return graph, input_BC, logits_BV
