"""Canonical names and shapes, Hugging Face's names for the same tensors, and the sizes read off shapes."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accessory.checkpoint.lazy import Lazy
from accessory.config import ModelArgs
from accessory.errors import ConfigError
from accessory.vision_config import ENCODER_PREFIXES, PROJECTION

log = logging.getLogger(__name__)

_LINEAR = re.compile(r"(.*\.w[qkvo123]|.*\.gate|output)\.weight")
_COMPANION = re.compile(r"(.*)\.(bias|lora_a\.weight|lora_b\.weight)")
_LAYER = re.compile(r"layers\.(\d+)\.")

_USUAL_HEAD_DIM = 128
_HEAD_KEYS = {"n_heads": ("n_heads", "num_attention_heads"), "head_dim": ("head_dim",)}

# Buffers that some writers save and that carry no information.
IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rope\.freqs|freqs_cis)")

_HF_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.gate.weight": "block_sparse_moe.gate.weight",
}
_HF_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_FROM_HF_LAYER = {theirs: ours for ours, theirs in _HF_LAYER.items()} | {"mlp.gate.weight": "feed_forward.gate.weight"}
_FROM_HF_TOP = {theirs: ours for ours, theirs in _HF_TOP.items()}


def expected_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Every tensor of a network of these sizes under its canonical name, in the order of the network."""
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (args.vocab_size, args.dim)}
    for i in range(args.n_layers):
        layer = f"layers.{i}."
        shapes[layer + "attention.wq.weight"] = (q, args.dim)
        shapes[layer + "attention.wk.weight"] = (kv, args.dim)
        shapes[layer + "attention.wv.weight"] = (kv, args.dim)
        shapes[layer + "attention.wo.weight"] = (args.dim, q)
        shapes[layer + "feed_forward.gate.weight"] = (args.moe.num_experts, args.dim)
        for e in range(args.moe.num_experts):
            expert = f"{layer}feed_forward.experts.{e}."
            shapes[expert + "w1.weight"] = (args.hidden_dim, args.dim)
            shapes[expert + "w2.weight"] = (args.dim, args.hidden_dim)
            shapes[expert + "w3.weight"] = (args.hidden_dim, args.dim)
        shapes[layer + "attention_norm.weight"] = (args.dim,)
        shapes[layer + "ffn_norm.weight"] = (args.dim,)
    shapes["norm.weight"] = (args.dim,)
    shapes["output.weight"] = (args.vocab_size, args.dim)
    return shapes


def image_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The tensors, in addition to `expected_shapes`, of a network that takes images: projections, start and end."""
    return args.sees_with.projection_shapes(args.dim)


def is_encoder_tensor(name: str) -> bool:
    """Whether a tensor belongs to an image encoder. Encoders are frozen and unsharded, and keep their file's names."""
    return name.startswith(ENCODER_PREFIXES)


def is_of_images(name: str) -> bool:
    """Whether only a model that takes images has this tensor: an encoder's, or a projection's to image tokens."""
    return is_encoder_tensor(name) or PROJECTION.fullmatch(name) is not None


def companion_of(name: str) -> tuple[str, str] | None:
    """An adapter tensor's name as (its weight, "bias" | "lora_a.weight" | "lora_b.weight"), None for other names."""
    match = _COMPANION.fullmatch(name)
    if match is None or _LINEAR.fullmatch(match[1] + ".weight") is None:
        return None
    return match[1] + ".weight", match[2]


def shape_problem(name: str, tensor: Lazy, expected: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is wrong with a tensor's name or shape in a network of the `expected` tensors; None if nothing is."""
    if is_encoder_tensor(name):
        return None  # `vision_names` checks it
    if name in expected:
        wanted: tuple[int | str, ...] = expected[name]
    else:
        companion = companion_of(name)
        if companion is None or companion[0] not in expected:
            return f"unexpected tensor {name} {tensor.shape}"
        rows, columns = expected[companion[0]]
        wanted = {"bias": (rows,), "lora_a.weight": ("rank", columns), "lora_b.weight": (rows, "rank")}[companion[1]]
    fits = len(wanted) == len(tensor.shape) and all(w in ("rank", n) for w, n in zip(wanted, tensor.shape, strict=True))
    if fits:
        return None
    return f"{name}: shape {tensor.shape}, but the configuration says ({', '.join(map(str, wanted))})"


def to_hf(name: str) -> str:
    """A canonical weight's name in a Hugging Face folder (the classic spelling, which transformers writes)."""
    match = _LAYER.match(name)
    if match is None:
        return _HF_TOP[name]
    rest = name[match.end() :]
    theirs = _HF_LAYER.get(rest) or rest.replace("feed_forward.experts.", "block_sparse_moe.experts.")
    return f"model.layers.{match[1]}.{theirs}"


def from_hf(name: str) -> str | None:
    """The canonical name of a Hugging Face tensor in the classic spelling; None for other names."""
    if name in _FROM_HF_TOP:
        return _FROM_HF_TOP[name]
    match = _LAYER.match(name.removeprefix("model."))
    if match is None:
        return None
    rest = name.removeprefix("model.")[match.end() :]
    if re.fullmatch(r"block_sparse_moe\.experts\.\d+\.w[123]\.weight", rest):
        return match[0] + rest.replace("block_sparse_moe", "feed_forward")
    return match[0] + _FROM_HF_LAYER[rest] if rest in _FROM_HF_LAYER else None


# --------------------------------------------------------------------------- sizes read off shapes


def sizes_from_shapes(tensors: Mapping[str, Lazy]) -> dict[str, tuple[int, str]]:
    """Read sizes off shapes: field → (size, name of a tensor with that size). If tensors differ, the majority wins.

    Keys: ModelArgs' fields, "moe.num_experts", and "q_rows" and "kv_rows" (heads × head_dim).
    """
    votes: dict[str, Counter[int]] = {}
    witness: dict[tuple[str, int], str] = {}

    def vote(field: str, value: int, name: str) -> None:
        votes.setdefault(field, Counter())[value] += 1
        witness.setdefault((field, value), name)

    for name, tensor in tensors.items():
        shape, rest = tensor.shape, _LAYER.sub("", name, count=1)
        if is_of_images(name):
            continue
        if rest.endswith("norm.weight") and len(shape) == 1:
            vote("dim", shape[0], name)
        if len(shape) != 2:
            continue
        if name == "tok_embeddings.weight" or name == "output.weight":
            vote("vocab_size", shape[0], name)
            vote("dim", shape[1], name)
        elif rest == "attention.wq.weight":
            vote("q_rows", shape[0], name)
            vote("dim", shape[1], name)
        elif rest == "attention.wk.weight" or rest == "attention.wv.weight":
            vote("kv_rows", shape[0], name)
        elif rest == "feed_forward.gate.weight":
            vote("moe.num_experts", shape[0], name)
        elif re.fullmatch(r"feed_forward\.experts\.\d+\.w[13]\.weight", rest):
            vote("hidden_dim", shape[0], name)
    sizes = {}
    for field, counter in votes.items():
        value = counter.most_common(1)[0][0]
        sizes[field] = (value, witness[field, value])
    layers = layer_numbers(tensors)
    if layers:
        last = max(layers)
        sizes["n_layers"] = (last + 1, next(n for n in tensors if n.startswith(f"layers.{last}.")))
    return sizes


def layer_numbers(names: Iterable[str]) -> set[int]:
    """The layer numbers that occur in canonical names."""
    return {int(match[1]) for match in map(_LAYER.match, names) if match}


def configure(
    sources: Sequence[Mapping[str, Any]], tensors: Mapping[str, Lazy], *, origin: str = "config", partial: bool = False
) -> ModelArgs:
    """Take the network's sizes from config `sources` (the last has precedence), the rest from the tensors' shapes.

    Shapes do not tell how q and k rows split into heads. ConfigError if no source does and 128 does not divide the
    rows, and if `partial` tensors come without a source and do not tell the sizes.
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
    """List where the configuration from `origin` contradicts the shapes: the field, both numbers and a tensor."""
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
