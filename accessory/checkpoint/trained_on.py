"""What an adapter's folder holds, and the model that it was trained on, as its `meta.json` keeps it.

The model is known by the hash of its norms and routers. They are a thousandth of the weights, so that reading them
costs nothing, and no format quantises them. They are rounded to bf16 first, so that copies of a model in fp32, in bf16
and quantised, in any layout, have one hash.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.names import companion_of
from accessory.config import read_json
from accessory.counts import spell_parameters
from accessory.errors import ConfigError

KEY = "trained_on"
BETWEEN = " + "  # the names of several folders
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
    import torch  # here, because `accessory info` needs none

    from accessory.checkpoint.hashing import digest_all, model_hash

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


@dataclass(frozen=True)
class Adapter:
    """A folder that holds an adapter alone, for people: what it is, and the commands that take it."""

    folder: Path
    rank: int  # the largest of its LoRA; 0: none
    parameters: int
    trained_on: TrainedOn | None

    def __str__(self) -> str:
        kind = f"LoRA of rank {self.rank}" if self.rank else "trained tensors without LoRA"
        where = "" if self.trained_on is None else f", trained on {self.trained_on.name}"
        return f"{kind}, {spell_parameters(self.parameters)} parameters{where}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON. The hash is that of the model's norms and routers."""
        on = self.trained_on
        told = {"lora_rank": self.rank, "parameters": self.parameters}
        return {**told, KEY: None if on is None else {"name": on.name, "hash": on.hash}}

    def command(self, name: str) -> str:
        """`accessory NAME` with the model and the adapter."""
        models = ["MODEL"] if self.trained_on is None else self.trained_on.name.split(BETWEEN)
        return shlex.join(["accessory", name, *models, str(self.folder)])

    def alone(self) -> str:
        """The message where a whole model is needed."""
        return (
            f"is an adapter ({self}) and no whole model; give its model before it (`{self.command('generate')}`), or "
            f"make a model of both (`{self.command('merge')} DST`)"
        )


def adapter_of(folder: Path, tensors: Mapping[str, Lazy], trained_on: TrainedOn | None) -> Adapter | None:
    """The adapter in a folder that lacks tensors of a model; None if it is a part of a model.

    An adapter says what it was trained on, or stands beside weights that are all elsewhere.
    """
    companions = [companion for companion in map(companion_of, tensors) if companion is not None]
    if trained_on is None and (not companions or any(weight in tensors for weight, _ in companions)):
        return None
    rank = max((t.shape[0] for n, t in tensors.items() if n.endswith(".lora_a.weight")), default=0)
    return Adapter(folder, rank, sum(math.prod(t.shape) for t in tensors.values()), trained_on)
