"""AdamW whose moments lie in pinned host memory: they visit the GPU a bucket at a time while the parameters are moved.

While one bucket is updated on the usual stream, a second stream brings the next one, and a third one takes the last
one back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from accessory.errors import InputError
from accessory.launch.memory import gigabytes
from accessory.limits import OPTIMIZER_PIECE, PIECES_ON_THE_WAY
from accessory.parallel.local_shard import local
from accessory.train.adamw import MOMENTS, AdamW, Piece, aligned, buckets


class OffloadedAdamW(AdamW):
    """The same updates as `AdamW` makes. `state` holds views of two long tensors in host memory."""

    def allocate(self, updates: int) -> None:
        sizes = [aligned(local(p).numel()) for _, p in self.named]
        pinned = any(local(p).is_cuda for _, p in self.named)
        self._flat = {moment: _host_zeros(sum(sizes), pinned) for moment in MOMENTS}
        parts = {moment: flat.split(sizes) for moment, flat in self._flat.items()}
        self.updates = updates
        self.state = {
            p: {moment: parts[moment][n][: local(p).numel()].view(local(p).shape) for moment in MOMENTS}
            for n, (_, p) in enumerate(self.named)
        }

    def step(self, scale: float | Tensor = 1.0) -> None:
        self._lanes = _Lanes(local(self.named[0][1]).device)
        super().step(scale)
        self._lanes.finish()
        del self._lanes  # its buffers are needed in a step alone

    def _in_turn(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """All at once: the moments of one piece come while another is updated."""
        return [list(range(len(pieces)))]

    def _update(self, pieces: Sequence[Piece], group: Mapping[str, Any], scale: float | Tensor) -> None:
        for bucket in buckets(pieces, OPTIMIZER_PIECE):
            with self._lanes.here(bucket) as visiting:
                self._adamw(visiting, group, scale)


class _Lanes:
    """Buffers on the device for a few buckets of moments, and the streams that fill and empty them.

    On a CPU there are no streams, and each copy is made at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers = [
            {moment: torch.empty(OPTIMIZER_PIECE, dtype=torch.float32, device=device) for moment in MOMENTS}
            for _ in range(PIECES_ON_THE_WAY)
        ]
        self.left: list[Any] = [None] * PIECES_ON_THE_WAY  # events: the last bucket in a buffer has gone back
        self.turn = 0
        self.coming = self.going = None
        if device.type == "cuda":
            self.coming, self.going = torch.cuda.Stream(device), torch.cuda.Stream(device)
            # The buffers may have been something else a moment ago.
            self.coming.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def here(self, bucket: Sequence[Piece]) -> Iterator[list[Piece]]:
        """The bucket's pieces with their moments on the device; what the block makes of them goes back."""
        turn, self.turn = self.turn, (self.turn + 1) % len(self.buffers)
        visiting, trips = self._placed(bucket, self.buffers[turn])
        with _on(self.coming):
            if self.coming is not None and self.left[turn] is not None:
                self.coming.wait_event(self.left[turn])
            for host, guest in trips:
                guest.copy_(host, non_blocking=True)
        if self.coming is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.coming)
        yield visiting
        if self.going is not None:
            self.going.wait_stream(torch.cuda.current_stream(self.device))
        with _on(self.going):
            for host, guest in trips:
                host.copy_(guest, non_blocking=True)
            self.left[turn] = None if self.going is None else self.going.record_event()

    def _placed(
        self, bucket: Sequence[Piece], buffers: Mapping[str, Tensor]
    ) -> tuple[list[Piece], list[tuple[Tensor, Tensor]]]:
        """The pieces with their moments' places in `buffers`, and (on the host, on the device) of each moment."""
        visiting, trips, start = [], [], 0
        for piece in bucket:
            numel = piece.value.numel()
            moments = {moment: buffers[moment][start : start + numel] for moment in MOMENTS}
            trips += [(piece.moments[moment], moments[moment]) for moment in MOMENTS]
            visiting.append(replace(piece, moments=moments))
            start += aligned(numel)
        return visiting, trips

    def finish(self) -> None:
        """Wait until everything has gone back: what comes next may read it on the host, or use the buffers' memory."""
        if self.going is not None:
            self.going.synchronize()


def _on(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _host_zeros(numel: int, pinned: bool) -> Tensor:
    """Zeros on the host. torch's allocator of pinned memory would round their bytes up to a power of two."""
    flat = torch.zeros(numel)
    if pinned and numel:
        status = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0))
        if status:
            raise InputError(
                f"offload: {gigabytes(flat.nbytes)} of host memory cannot be pinned (CUDA error {status}); leave "
                "offload out"
            )
        weakref.finalize(flat, _unpin, flat.data_ptr()).atexit = False
    return flat


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
