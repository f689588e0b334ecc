"""The configuration of a folder: its config files held against, and completed from, the tensors' shapes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.names import sizes_from_shapes
from accessory.config import ModelArgs
from accessory.errors import ConfigError

log = logging.getLogger(__name__)

_USUAL_HEAD_DIM = 128
_HEAD_KEYS = {"n_heads": ("n_heads", "num_attention_heads"), "head_dim": ("head_dim",)}


def configure(
    sources: Sequence[Mapping[str, Any]], tensors: Mapping[str, Lazy], *, origin: str = "config", partial: bool = False
) -> ModelArgs:
    """The network's sizes from config `sources` (the last takes precedence), the rest from the tensors' shapes.

    ConfigError names what no source tells and shapes cannot: the split of q and k rows into heads.
    """
    shapes = {field: value for field, (value, _) in sizes_from_shapes(tensors).items()}
    if partial and not sources and not {"dim", "hidden_dim", "vocab_size", "q_rows"} <= shapes.keys():
        raise ConfigError(
            "config.json: missing, and a save of the trained tensors alone does not tell the network's sizes; "
            "put it beside them or give the configuration of the model they belong to"
        )
    known: dict[str, Any] = {f: shapes[f] for f in ("dim", "hidden_dim", "vocab_size") if f in shapes}
    if not partial and "n_layers" in shapes:
        known["n_layers"] = shapes["n_layers"]
    experts = shapes.get("moe.num_experts")
    if experts is not None:
        known["moe"] = {"num_experts": experts, "num_experts_per_tok": min(2, experts)}
    known.update(_heads(sources, shapes))
    if not sources:
        log.warning(
            "no config.json or params.json: sizes are read off the tensors; experts per token, rope_theta and norm_eps "
            "are taken to be Mixtral's"
        )
    return ModelArgs.from_dicts(known, *sources, origin=origin)


def _given(sources: Sequence[Mapping[str, Any]], field: str) -> int | None:
    for source in reversed(sources):
        for key in _HEAD_KEYS[field]:
            if isinstance(source.get(key), int) and source[key] > 0:
                return source[key]
    return None


def _heads(sources: Sequence[Mapping[str, Any]], shapes: Mapping[str, int]) -> dict[str, int]:
    if "q_rows" not in shapes or "kv_rows" not in shapes:
        return {}
    q_rows, kv_rows = shapes["q_rows"], shapes["kv_rows"]
    n_heads, head_dim = _given(sources, "n_heads"), _given(sources, "head_dim")
    if head_dim is None and n_heads is not None:
        head_dim = q_rows // n_heads if q_rows % n_heads == 0 else None
    elif head_dim is None:
        if q_rows % _USUAL_HEAD_DIM or kv_rows % _USUAL_HEAD_DIM:
            raise ConfigError(
                f"n_heads, n_kv_heads, head_dim: shapes tell only their products, {q_rows} and {kv_rows}; "
                "give a params.json or config.json that says n_heads"
            )
        head_dim = _USUAL_HEAD_DIM
        log.warning("no configuration says n_heads: taking head_dim to be %d", head_dim)
    if head_dim is None or q_rows % head_dim or kv_rows % head_dim:
        return {}  # contradictory: `field_problems` says how
    return {"n_heads": q_rows // head_dim, "n_kv_heads": kv_rows // head_dim, "head_dim": head_dim}


def field_problems(args: ModelArgs, tensors: Mapping[str, Lazy], origin: str) -> list[str]:
    """Where the configuration from `origin` and the shapes disagree: the field, both numbers and a tensor."""
    told = {
        "dim": args.dim,
        "hidden_dim": args.hidden_dim,
        "n_layers": args.n_layers,
        "vocab_size": args.vocab_size,
        "moe.num_experts": args.moe.num_experts,
        "q_rows": args.n_heads * args.head_dim,
        "kv_rows": args.n_kv_heads * args.head_dim,
    }
    spelled = {"q_rows": "n_heads × head_dim", "kv_rows": "n_kv_heads × head_dim"}
    problems = []
    for field, (value, name) in sizes_from_shapes(tensors).items():
        # Fewer layers than configured: tensors are missing, which has its own message.
        if value != told[field] and not (field == "n_layers" and value < told[field]):
            problems.append(
                f"{spelled.get(field, field)}: {origin} says {told[field]}, but by {name} "
                f"{tensors[name].shape} it is {value}"
            )
    return problems
