"""The card that holds a kernel's tensors: launches there (`on_its_card`), and the tiles measured on it.

And the names of kernels in Triton's cache.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

from accessory.ops import tiles

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def on_its_card(launch: Launcher) -> Launcher:
    """Decorate a function that launches kernels: they run on the card of its first argument.

    Triton launches on the current device of this thread, whatever card the tensors lie on. Every thread begins with
    card 0. Where the current device is the right one, this costs a comparison.
    """

    @functools.wraps(launch)
    def launch_there(first: Any, /, *others: Any, **named: Any) -> Any:
        name_kernels(launch.__module__)
        device = first.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():  # on a CPU, Triton's interpreter runs
            return launch(first, *others, **named)
        with torch.cuda.device(device):
            return launch(first, *others, **named)

    return launch_there  # type: ignore[return-value]


@cache
def name_kernels(module: str) -> None:
    """Fix the names that a module's kernels have in Triton's cache on the disk.

    Triton 3.6 makes a kernel's name when the kernel is first used, and leaves out the constants of functions whose own
    names are not made yet. So the names would follow from which kernel a process uses first, and a process that begins
    with another one would compile kernels again that are there. Here functions come before those that call them.
    """
    for value in list(vars(sys.modules[module]).values()):
        if hasattr(type(value), "cache_key"):  # a function of Triton's, not one of its interpreter
            if value.__module__ != module:
                name_kernels(value.__module__)
            value.cache_key  # noqa: B018


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. Triton's own takes ten times as long, because kernels may call it too."""
    return -(-a // b)


def measured_on(
    device: torch.device, family: str, format: str, out_features: int, in_features: int, rows: float
) -> dict[str, Any] | None:
    """The tile that `accessory tune` found for this card; None where nobody measured it."""
    if device.type != "cuda":
        return None
    found = tiles.measured(_card_name(device), family, format, out_features, in_features, rows)
    return None if found is None else dict(found)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def shared_bytes(device: torch.device) -> int:
    """The shared memory that a program of the card may have; in Triton's interpreter, that of an H100."""
    if device.type != "cuda":
        return 232_448
    import triton

    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


@cache
def _card_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
