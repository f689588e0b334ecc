"""What passes between the driver of a model and its ranks: plain values, which need nothing shared to be sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGES = ("image", "images")  # arguments of MetaModel's methods


def arguments_to_send(arguments: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments; images are opened here, so that what is wrong with one is said by one process."""
    return {name: image_to_send(v) if name in IMAGES else to_ids(v) for name, v in arguments.items()}


def arguments_received(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: from_plain(v) if name in IMAGES else v for name, v in arguments.items()}


def to_ids(value: Any) -> Any:
    """Prompts as strings and lists: an array or tensor of ids would be shared with the ranks, not sent."""
    if isinstance(value, list | tuple):
        return [to_ids(v) for v in value]
    return value.tolist() if isinstance(value, Tensor | np.ndarray) else value


def image_to_send(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [image_to_send(v) for v in value]
    if isinstance(value, str | Path) or hasattr(value, "convert"):
        from accessory.data.images import open_image

        return open_image(value)
    return to_plain(value)


def to_plain(value: Any) -> Any:
    """Tensors as arrays."""
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [to_plain(v) for v in value]
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: from_plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
