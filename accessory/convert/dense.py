"""Dense Llama and Mistral checkpoints, under canonical names: networks with one feed-forward per layer.

Canonical names are those of the mixture, but `layers.i.feed_forward.{w1,w2,w3}.weight` replace router and experts: w1
is the gate projection (F, D), w3 the up projection (F, D), w2 the down projection (D, F). q and k rows are interleaved.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from accessory.checkpoint.gguf import read_gguf, spelling
from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.rotary import rotary_from_hf
from accessory.checkpoint.weight_files import find_resources, find_weights
from accessory.config import ModelArgs, MoEArgs, read_json
from accessory.convert import gguf_tokenizer
from accessory.errors import CheckpointError, ConfigError, listed

ONE_EXPERT = MoEArgs(num_experts=1, num_experts_per_tok=1)


@dataclass(frozen=True, kw_only=True)
class Dense:
    """An opened dense checkpoint. `args.moe` says one expert; `tensors` maps canonical names to whole lazy tensors."""

    args: ModelArgs
    tensors: dict[str, Lazy]
    # Returns the paths of the tokenizer's files. If they are not files yet, it writes them into the given folder.
    resources: Callable[[Path], list[Path]] = field(default=lambda scratch: [])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most bytes have."""
        count: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            count[tensor.dtype] += tensor.nbytes
        return max(count, key=lambda dtype: count[dtype])


def dense_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a dense network of these sizes, by canonical name."""
    query, key = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    layer = {
        "attention_norm.weight": (args.dim,),
        "ffn_norm.weight": (args.dim,),
        "attention.wq.weight": (query, args.dim),
        "attention.wk.weight": (key, args.dim),
        "attention.wv.weight": (key, args.dim),
        "attention.wo.weight": (args.dim, query),
        "feed_forward.w1.weight": (args.hidden_dim, args.dim),
        "feed_forward.w2.weight": (args.dim, args.hidden_dim),
        "feed_forward.w3.weight": (args.hidden_dim, args.dim),
    }
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (args.vocab_size, args.dim)}
    for i in range(args.n_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"norm.weight": (args.dim,), "output.weight": (args.vocab_size, args.dim)}


def check_dense(found: Mapping[str, Lazy], args: ModelArgs, origin: Path, spelling: Callable[[str], str]) -> None:
    """Raise CheckpointError unless `found` has exactly the tensors of these sizes; `spelling` gives its own names."""
    if args.n_layers > len(found):  # before a damaged number makes us list millions of names
        raise CheckpointError(
            f"{origin}: the configuration says {args.n_layers} layers, which {len(found)} tensors are not"
        )
    wanted = dense_shapes(args)
    if missing := [spelling(name) for name in wanted if name not in found]:
        raise CheckpointError(f"{origin}: tensors are missing: {listed(sorted(missing))}")
    if extra := [spelling(name) for name in found if name not in wanted]:
        raise CheckpointError(
            f"{origin}: tensors beyond the {args.n_layers} layers of the configuration: {listed(sorted(extra))}"
        )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            given = found[name].shape
            raise CheckpointError(f"{origin}: {spelling(name)} has shape {given}, but the configuration says {shape}")


def open_gguf(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> Dense:
    """Open the GGUF file of a dense network; no tensor is read. `dtype` and errors are those of `read_gguf`.

    Raises CheckpointError also for a file that is incomplete, or that holds a mixture.
    """
    file = read_gguf(path, dtype, dense=True)
    check_dense(file.tensors, file.args, file.path, spelling)
    return Dense(
        args=file.args,
        tensors=file.tensors,
        resources=lambda scratch: gguf_tokenizer.write(file.metadata, scratch, file.path),
    )


# transformers' defaults for keys that a config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "sliding_window": None,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
_NAMES = {"model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.norm": "norm"}
_LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def open_hf_dense(folder: str | Path) -> Dense:
    """Open a Hugging Face folder of LlamaForCausalLM or MistralForCausalLM, single or sharded; no tensor is read.

    Raises CheckpointError or ConfigError naming the file, field or tensor that is missing or that a Mixtral cannot have
    (biases, other activations, quantised weights, a network that is already a mixture).
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    args = _hf_args(config, folder / "config.json")
    weights = find_weights(folder)
    raw = {name: lazy for file in weights.read().values() for name, lazy in (file or {}).items()}
    if weights.problems:
        raise CheckpointError(f"{folder}: {'; '.join(weights.problems)}")
    tensors: dict[str, Lazy] = {}
    unknown = []
    for name, lazy in raw.items():
        if name.endswith("rotary_emb.inv_freq"):  # a buffer that old versions saved
            continue
        if (canonical := _canonical(name)) is None:
            unknown.append(name)
        else:
            tensors[canonical] = lazy
    if unknown:
        raise CheckpointError(f"{folder}: holds tensors that a Mixtral cannot have: {listed(sorted(unknown))}")
    if config.get("tie_word_embeddings", False) and "tok_embeddings.weight" in tensors:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    check_dense(tensors, args, folder, _spelling)
    tensors = {name: rotary_from_hf(name, tensor, args) for name, tensor in tensors.items()}
    return Dense(args=args, tensors=tensors, resources=lambda scratch: find_resources(folder))


def _hf_args(config: Mapping[str, Any], path: Path) -> ModelArgs:
    kind = config.get("model_type")
    if experts := config.get("num_local_experts") or config.get("moe"):
        raise CheckpointError(f"{path}: already a mixture (experts: {experts}); only a dense network can be upcycled")
    if kind not in _DEFAULTS:
        raise CheckpointError(f"{path}: model_type is {kind!r}; dense networks that can be read are llama and mistral")
    for name, wanted in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if (given := config.get(name, wanted)) != wanted:
            raise ConfigError(f"{path}: {name}: got {given!r}, but a Mixtral can only take {wanted!r} over")
    if "quantization_config" in config:
        raise ConfigError(f"{path}: quantization_config: quantised weights cannot be taken over; give the plain ones")
    full = {**_DEFAULTS[kind], **{key: value for key, value in config.items() if value is not None}}
    if kind == "mistral" and config.get("sliding_window", 0) is None:
        full["sliding_window"] = None
    full.setdefault("num_key_value_heads", full["num_attention_heads"])
    args = ModelArgs.from_dicts(full, origin=str(path))
    window = full["sliding_window"]
    # A Mixtral has no sliding window, so beyond its length the network would compute something else.
    return args.replace(moe=ONE_EXPERT, max_seq_len=min(args.max_seq_len, window) if window else args.max_seq_len)


def _canonical(name: str) -> str | None:
    if (stem := name.removesuffix(".weight")) == name:
        return None
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
        inner = _LAYER_NAMES.get(match[2])
        return f"layers.{match[1]}.{inner}.weight" if inner else None
    return f"{_NAMES[stem]}.weight" if stem in _NAMES else None


def _spelling(canonical: str) -> str:
    """A canonical name as Hugging Face spells it."""
    stem = canonical.removesuffix(".weight")
    for theirs, ours in _NAMES.items():
        if ours == stem:
            return f"{theirs}.weight"
    _, layer, inner = stem.split(".", 2)
    return next(f"model.layers.{layer}.{theirs}.weight" for theirs, ours in _LAYER_NAMES.items() if ours == inner)
