"""Tensors on their way between host and device, while the host goes on with other work."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Begin to copy x to a device. From memory that is not pinned, a GPU copies only when all its work is done, and the
    host waits until then; so x is pinned first."""
    return pinned(x, device).to(device, non_blocking=True)


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """x, or a copy, from which `device` copies without making the host wait."""
    return x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x


def to_host(x: Tensor) -> Tensor:
    """Begin to copy x to the host. The copy may be read when a `Ready` that was made later has waited."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)


class Ready:
    """What `device` was given to do up to now. `wait` returns when it is done."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()
