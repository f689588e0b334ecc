"""The model that an adapter was trained on, as `meta.json` of the adapter's folder keeps it.

It is known by the hash of its norms and routers. They are a thousandth of the weights, so that reading them costs
nothing, and no format quantises them. They are rounded to bf16 first, so that copies of a model in fp32, in bf16 and
quantised, in any layout, have one hash.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accessory.checkpoint.hashing import digest_all, model_hash
from accessory.checkpoint.lazy import Lazy
from accessory.config import read_json
from accessory.errors import ConfigError

KEY = "trained_on"
_KEPT = re.compile(r"(layers\.\d+\.(attention_norm|ffn_norm|feed_forward\.gate)|norm)\.weight")


@dataclass(frozen=True)
class TrainedOn:
    """`name`: paths or addresses as they were given, for people. `hash`: that of `base_hash`."""

    name: str
    hash: str

    def to_dict(self) -> dict[str, Any]:
        """What is added to meta.json."""
        return {KEY: {"name": self.name, "hash": self.hash}}


def base_hash(tensors: Mapping[str, Lazy]) -> str:
    """The hash of `hashing.model_hash`, of norms and routers alone, rounded to bf16. `tensors` are canonical."""
    kept = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items() if _KEPT.fullmatch(name)}
    return model_hash(digest_all(kept, progress=False))


def read_trained_on(folder: Path) -> TrainedOn | None:
    """Read the folder's meta.json; None if it says nothing. ConfigError if it says it in another form."""
    meta = folder / "meta.json"
    said = read_json(meta).get(KEY) if meta.is_file() else None
    if said is None:
        return None
    if not isinstance(said, Mapping) or not all(isinstance(said.get(key), str) for key in ("name", "hash")):
        raise ConfigError(f"meta.json: {KEY}: got {said!r}, but it must be an object with the texts name and hash")
    return TrainedOn(said["name"], said["hash"])
