"""Runs kernels on the card that holds their tensors: `on_its_card`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def on_its_card(launch: Launcher) -> Launcher:
    """Decorate a function that launches kernels: they run on the card of its first argument.

    Triton launches on the current device of this thread, whatever card the tensors lie on. Every thread begins with
    card 0. Where the current device is the right one, this costs a comparison.
    """

    @functools.wraps(launch)
    def launch_there(first: Any, *others: Any, **named: Any) -> Any:
        device = first.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():  # on a CPU, Triton's interpreter runs
            return launch(first, *others, **named)
        with torch.cuda.device(device):
            return launch(first, *others, **named)

    return launch_there  # type: ignore[return-value]
