"""The values that a model's driver and its ranks exchange. They are plain values, so sending needs no shared memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accessory.arguments import check_max_gen_len
from accessory.engine.sampling import Sampling

IMAGES = ("image", "images")  # arguments of MetaModel's methods


def arguments_to_send(arguments: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments as plain values. Images are opened here, so that only the driver reports a bad one."""
    return {name: image_to_send(v) if name in IMAGES else to_ids(v) for name, v in arguments.items()}


def sampling_arguments(
    max_gen_len: int, max_seq_len: int, temperature: float, top_p: float, stops: Iterable[str], seed: Any
) -> dict[str, Any]:
    """The arguments that say how the ranks generate. InputError for a wrong one, before any rank gets it."""
    check_max_gen_len(max_gen_len, max_seq_len)
    Sampling(temperature, top_p, seed)
    return {
        "max_gen_len": max_gen_len,
        "temperature": temperature,
        "top_p": top_p,
        "additional_stop_symbols": stops if isinstance(stops, str) else list(stops),
        # Without a seed, one is drawn here, so that torch.manual_seed in this process makes the ranks repeat.
        "seed": int(torch.randint(2**62, ())) if seed is None and temperature else seed,
    }


def arguments_received(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a rank received, with images as tensors again."""
    return {name: from_plain(v) if name in IMAGES else v for name, v in arguments.items()}


def to_ids(value: Any) -> Any:
    """Prompts as strings and lists. An array or tensor of ids would be sent as shared memory."""
    if isinstance(value, list | tuple):
        return [to_ids(v) for v in value]
    return value.tolist() if isinstance(value, Tensor | np.ndarray) else value


def image_to_send(value: Any) -> Any:
    """Images as Pillow images or arrays. Opens paths; InputError for a file that is no image."""
    if isinstance(value, list | tuple):
        return [image_to_send(v) for v in value]
    if isinstance(value, str | Path) or hasattr(value, "convert"):
        from accessory.data.images import open_image

        return open_image(value)
    return to_plain(value)


def to_plain(value: Any) -> Any:
    """Replace tensors by arrays, also in dicts and lists."""
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [to_plain(v) for v in value]
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def from_plain(value: Any) -> Any:
    """Undo `to_plain`: replace arrays by tensors."""
    if isinstance(value, dict):
        return {k: from_plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
