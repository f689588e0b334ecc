"""Canonical names and shapes, and what each layout calls the same tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from accessory.checkpoint.lazy import Lazy
from accessory.config import ModelArgs
from accessory.vision_config import ENCODER_PREFIXES, PROJECTION

_LINEAR = re.compile(r"(.*\.w[qkvo123]|.*\.gate|output)\.weight")
_COMPANION = re.compile(r"(.*)\.(bias|lora_a\.weight|lora_b\.weight)")
_LAYER = re.compile(r"layers\.(\d+)\.")

# Buffers that some writers save and that say nothing.
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
    """What a network of these sizes that sees has beside `expected_shapes`: projections, start and end."""
    return args.sees_with.projection_shapes(args.dim)


def is_encoder_tensor(name: str) -> bool:
    """Whether a tensor is of an image encoder: frozen, whole everywhere, under its file's own name."""
    return name.startswith(ENCODER_PREFIXES)


def is_of_images(name: str) -> bool:
    """Whether only a model that sees has this tensor: an encoder's, or what makes its output words."""
    return is_encoder_tensor(name) or PROJECTION.fullmatch(name) is not None


def companion_of(name: str) -> tuple[str, str] | None:
    """(the weight it belongs to, "bias" | "lora_a.weight" | "lora_b.weight"), or None for another name."""
    match = _COMPANION.fullmatch(name)
    if match is None or _LINEAR.fullmatch(match[1] + ".weight") is None:
        return None
    return match[1] + ".weight", match[2]


def shape_problem(name: str, tensor: Lazy, expected: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is wrong with a tensor of this name and shape in a network of the `expected` tensors; None: nothing."""
    if is_encoder_tensor(name):
        return None  # its own network says what it should be
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
    """The canonical name of a Hugging Face tensor in the classic spelling; None for a name of no such tensor."""
    if name in _FROM_HF_TOP:
        return _FROM_HF_TOP[name]
    match = _LAYER.match(name.removeprefix("model."))
    if match is None:
        return None
    rest = name.removeprefix("model.")[match.end() :]
    if re.fullmatch(r"block_sparse_moe\.experts\.\d+\.w[123]\.weight", rest):
        return match[0] + rest.replace("block_sparse_moe", "feed_forward")
    return match[0] + _FROM_HF_LAYER[rest] if rest in _FROM_HF_LAYER else None


def sizes_from_shapes(tensors: Mapping[str, Lazy]) -> dict[str, tuple[int, str]]:
    """Sizes that the shapes tell, each with the name of a tensor that tells it; by majority where tensors differ.

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
    return {int(match[1]) for match in map(_LAYER.match, names) if match}
