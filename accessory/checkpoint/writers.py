"""Plan what each layout writes: files, their tensors, and which part of which canonical tensor goes where."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.names import companion_of, is_of_images, layer_numbers, to_hf
from accessory.checkpoint.rotary import rotary_to_hf
from accessory.config import Implementation, LlamaType, ModelArgs
from accessory.errors import CheckpointError, ConfigError
from accessory.parallel.sharding import Slice, check_world, cut_dim, expert_of, largest_world, rank_slice

Target = Literal["base", "sparse", "hf", "torrent"]
TARGETS: tuple[Target, ...] = ("base", "sparse", "hf", "torrent")
Cut = Callable[[Lazy], Lazy]

_HF_FILE_BYTES = 5 * 10**9


@dataclass
class Slot:
    """A tensor of a file: cuts of canonical tensors, concatenated along dimension 0."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[tuple[str, Cut]]


@dataclass
class FilePlan:
    """A file to write. The ending of its name gives the format."""

    name: str
    slots: dict[str, Slot] = field(default_factory=dict)
    nested: bool = False  # {"model": {…}} around the tensors (.pth)
    # Makes the file without its tensor data and returns where each slot begins, if the ending does not tell how.
    lay_out: Callable[[Path, FilePlan], dict[str, int]] | None = None

    @property
    def nbytes(self) -> int:
        return sum(torch.Size(s.shape).numel() * s.dtype.itemsize for s in self.slots.values())


@dataclass
class FolderPlan:
    """All files of a checkpoint of one layout except resources: tensor files and JSON files."""

    files: list[FilePlan]
    documents: dict[str, dict[str, Any]]  # file name → contents
    is_file: bool = False  # its only file is the destination itself, and no folder is made


def plan_folder(
    to: Target,
    tensors: Mapping[str, Lazy],
    args: ModelArgs,
    *,
    shards: int | None = None,
    safetensors: bool = False,
    image_views: int = 0,
) -> FolderPlan:
    """Plan a folder of layout `to`; arguments are those of `write_checkpoint`.

    ConfigError for an unknown layout or an impossible number of shards; CheckpointError for tensors that the layout
    cannot express.
    """
    if to not in TARGETS:
        raise ConfigError(f"to: got {to!r}, but it must be one of {', '.join(TARGETS)}")
    if shards is not None and shards < 1:
        raise ConfigError(f"shards: got {shards}, but it must be at least 1")
    if to == "base" or to == "sparse":
        return _plan_accessory(to, tensors, args, shards, safetensors, image_views)
    refuse_companions(to, tensors)
    if to == "hf":
        return _plan_hf(tensors, args, shards)
    if shards not in (None, 1) or safetensors:
        raise ConfigError("the torrent layout is one consolidated.00.pth: neither shards nor safetensors apply")
    return _plan_torrent(tensors, args)


def refuse_companions(to: str, tensors: Mapping[str, Lazy]) -> None:
    """Raise CheckpointError if there are tensors of images, biases or LoRA; most layouts have no place for them."""
    seeing = [name for name in tensors if is_of_images(name)]
    if seeing:
        raise CheckpointError(
            f"{seeing[0]}: the {to} layout has no place for what a model sees with ({len(seeing)} such tensors); write "
            "base or sparse"
        )
    foreign = [name for name in tensors if companion_of(name)]
    if foreign:
        raise CheckpointError(
            f"{foreign[0]}: the {to} layout has no place for biases and LoRA; merge them into the weights first "
            f"({len(foreign)} such tensors)"
        )


def _whole(lazy: Lazy) -> Lazy:
    return lazy


def _narrow(lazy: Lazy, dim: int, start: int, length: int) -> Lazy:
    return lazy.narrow(dim, start, length)


def _transposed_rows(lazy: Lazy, start: int, length: int) -> Lazy:
    return lazy.t().narrow(0, start, length)


def _plan_accessory(
    implementation: Implementation,
    tensors: Mapping[str, Lazy],
    args: ModelArgs,
    shards: int | None,
    safetensors: bool,
    image_views: int,
) -> FolderPlan:
    if "start_img" in tensors and not image_views:
        raise ConfigError("image_views: got 0, but there are tensors of a model that sees; say how many it has, 1 or 5")
    world = largest_world(args, implementation) if shards is None else shards
    check_world(args, implementation, world)
    ending = "safetensors" if safetensors else "pth"
    files = []
    for rank in range(world):
        file = FilePlan(f"consolidated.{rank:02d}-of-{world:02d}.model.{ending}", nested=not safetensors)
        for name, tensor in tensors.items():
            piece = rank_slice(name, tensor.shape, implementation, rank, world, args.moe.num_experts)
            if piece is None:
                continue
            if implementation == "sparse" and _is_expert_weight(name):
                _stack(file, "llma." + _stacked_name(name, "feed_forward."), name, tensor, piece)
            else:
                file.slots["llma." + name] = _slot(name, tensor, piece)
        files.append(file)
    peft = any(companion_of(name) for name in tensors)
    documents = {
        "config.json": args.to_dict(),
        "meta.json": {"llama_type": str(LlamaType(implementation, peft, image_views))},
    }
    return FolderPlan(files, documents)


def _is_expert_weight(name: str) -> bool:
    return expert_of(name) is not None and companion_of(name) is None


def _stacked_name(name: str, middle: str) -> str:
    """`layers.3.feed_forward.experts.5.w2.weight` → `layers.3.<middle>w2`."""
    layer, rest = name.split("feed_forward.experts.")
    return layer + middle + rest.split(".")[1]


def _slot(name: str, tensor: Lazy, piece: Slice) -> Slot:
    if piece.dim is None:
        return Slot(tensor.shape, tensor.dtype, [(name, _whole)])
    shape = (*tensor.shape[: piece.dim], piece.length, *tensor.shape[piece.dim + 1 :])
    cut = partial(_narrow, dim=piece.dim, start=piece.start, length=piece.length)
    return Slot(shape, tensor.dtype, [(name, cut)])


def _stack(file: FilePlan, stacked: str, name: str, tensor: Lazy, piece: Slice) -> None:
    """Append one expert's rows to the stack of all experts; w2 is stored transposed."""
    is_w2 = cut_dim(name, "sparse") == 1
    rows, columns = tensor.shape[::-1] if is_w2 else tensor.shape
    start, length = (0, rows) if piece.dim is None else (piece.start, piece.length)
    slot = file.slots.setdefault(stacked, Slot((0, columns), tensor.dtype, []))
    if slot.dtype != tensor.dtype:
        raise CheckpointError(f"{name}: is {tensor.dtype}, other experts are {slot.dtype}; give one --dtype for all")
    cut = partial(_transposed_rows, start=start, length=length) if is_w2 else None
    cut = cut or partial(_narrow, dim=0, start=start, length=length)
    slot.parts.append((name, cut))
    slot.shape = (slot.shape[0] + length, columns)


def _plan_torrent(tensors: Mapping[str, Lazy], args: ModelArgs) -> FolderPlan:
    file = FilePlan("consolidated.00.pth")
    for name, tensor in tensors.items():
        if _is_expert_weight(name):
            _stack(file, _stacked_name(name, "block_sparse_moe."), name, tensor, Slice(None))
        else:
            theirs = name.replace("feed_forward.gate", "block_sparse_moe.gate")
            file.slots[theirs] = _slot(name, tensor, Slice(None))
    params: dict[str, Any] = {
        key: getattr(args, key)
        for key in "dim n_layers head_dim hidden_dim n_heads n_kv_heads norm_eps vocab_size rope_theta".split()
    }
    params["moe"] = {"num_experts_per_tok": args.moe.num_experts_per_tok, "num_experts": args.moe.num_experts}
    if args.rope_scaling is not None:
        params["rope_scaling"] = args.rope_scaling
    if args.max_seq_len != ModelArgs().max_seq_len:
        params["max_seq_len"] = args.max_seq_len
    return FolderPlan([file], {"params.json": params})


def _plan_hf(tensors: Mapping[str, Lazy], args: ModelArgs, shards: int | None) -> FolderPlan:
    total = sum(t.nbytes for t in tensors.values())
    count = shards or max(1, -(-total // _HF_FILE_BYTES))
    groups: list[dict[str, Slot]] = [{} for _ in range(count)]
    done = 0
    for name, tensor in tensors.items():
        cut = partial(rotary_to_hf, name, args=args)
        groups[min(count - 1, done * count // max(1, total))][to_hf(name)] = Slot(
            tensor.shape, tensor.dtype, [(name, cut)]
        )
        done += tensor.nbytes
    groups = [group for group in groups if group]
    if len(groups) == 1:
        files = [FilePlan("model.safetensors", groups[0])]
    else:
        files = [
            FilePlan(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)
        ]
    documents = {"config.json": _hf_config(tensors, args)}
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name in file.slots}
        documents["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return FolderPlan(files, documents)


def _hf_config(tensors: Mapping[str, Lazy], args: ModelArgs) -> dict[str, Any]:
    """A config.json that both transformers 4 and 5 read: rope_theta and rope_scaling are keys at the top level."""
    sample = tensors.get("layers.0.attention.wq.weight") or next(iter(tensors.values()))
    config: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": max(layer_numbers(tensors), default=args.n_layers - 1) + 1,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "max_position_embeddings": args.max_seq_len,
        "num_local_experts": args.moe.num_experts,
        "num_experts_per_tok": args.moe.num_experts_per_tok,
        "router_aux_loss_coef": args.load_balancing_weight,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(sample.dtype).removeprefix("torch."),
    }
    if args.rope_scaling is not None:
        config["rope_scaling"] = json.loads(json.dumps(dict(args.rope_scaling)))
    return config
