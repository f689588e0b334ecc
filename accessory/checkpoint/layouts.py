"""Read each layout: its reader maps raw tensors to whole lazy tensors under canonical names.

Readers append what is wrong to `problems` and continue, so that `verify` and `info` can report all of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from accessory.checkpoint.lazy import Lazy, concat
from accessory.checkpoint.names import IGNORED, companion_of, from_hf
from accessory.checkpoint.quantized_names import is_quantized_piece
from accessory.config import Implementation
from accessory.parallel.sharding import cut_dim, expert_of, is_replicated

Layout = Literal["torrent", "official", "hf", "base", "sparse", "quantized", "gguf"]

_TORRENT_EXPERTS = re.compile(r"(layers\.\d+\.)block_sparse_moe\.(w[123])(?:\.weight)?")
_SPARSE_EXPERTS = re.compile(r"(layers\.\d+\.)feed_forward\.(w[123])(?:\.weight)?")
_HF_FUSED = re.compile(r"(?:model\.)?(layers\.\d+\.)mlp\.experts\.(gate_up_proj|down_proj)")
_CHECKED_ALWAYS = re.compile(r"norm\.weight|layers\.0\..*")


def recognise(names: Sequence[str], sharded: bool) -> Layout | None:
    """The layout of tensors with these raw names, or None. `sharded`: their files are named `…RR-of-NN.model…`."""
    if sharded:
        stacked = any(_SPARSE_EXPERTS.fullmatch(n.removeprefix("llma.")) for n in names)
        # A save of LoRA and biases alone has no stacks. In the sparse layout every shard has a part of each expert's
        # adapter, so that names repeat.
        adapters = [n for n in names if expert_of(n) is not None and companion_of(n.removeprefix("llma."))]
        return "sparse" if stacked or len(adapters) > len(set(adapters)) else "base"
    return next((layout for layout, reader in READERS.items() if any(map(reader.has, names))), None)


def read_single(layout: Layout, files: Mapping[str, Mapping[str, Lazy]], problems: list[str]) -> dict[str, Lazy]:
    """Canonical tensors of a layout without model-parallel shards; `files` maps file names to their raw tensors.

    Rotary rows of the hf layout keep that layout's order, because permuting them needs the number of heads.
    """
    raw: dict[str, Lazy] = {}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if name in raw:
                problems.append(f"{file}: tensor {name} is also in another file")
            raw[name] = tensor
    raw = {name: tensor for name, tensor in raw.items() if not IGNORED.fullmatch(name)}
    return READERS[layout].read(raw, problems)


def _read_hf(raw: Mapping[str, Lazy], problems: list[str]) -> dict[str, Lazy]:
    out: dict[str, Lazy] = {}
    for name, tensor in raw.items():
        fused = _HF_FUSED.fullmatch(name)
        if fused and len(tensor.shape) == 3:
            _split_fused(fused[1], fused[2], tensor, out)
            continue
        ours = from_hf(name)
        if ours is None:
            problems.append(f"unexpected tensor {name} {tensor.shape}")
        else:
            out[ours] = tensor
    return out


def _split_fused(layer: str, kind: str, tensor: Lazy, out: dict[str, Lazy]) -> None:
    """Split a stack of experts into their weights.

    gate_up_proj (E, 2F, D) holds w1 in the first F rows and w3 in the last F; down_proj (E, D, F) is w2.
    """
    for e in range(tensor.shape[0]):
        expert, prefix = tensor.select(0, e), f"{layer}feed_forward.experts.{e}."
        if kind == "down_proj":
            out[prefix + "w2.weight"] = expert
        else:
            half = expert.shape[0] // 2
            out[prefix + "w1.weight"] = expert.narrow(0, 0, half)
            out[prefix + "w3.weight"] = expert.narrow(0, half, half)


def _read_torrent(raw: Mapping[str, Lazy], problems: list[str]) -> dict[str, Lazy]:
    out: dict[str, Lazy] = {}
    for name, tensor in raw.items():
        match = _TORRENT_EXPERTS.fullmatch(name)
        if match is None:
            out[name.replace(".block_sparse_moe.gate.", ".feed_forward.gate.")] = tensor
            continue
        gate = raw.get(match[1] + "block_sparse_moe.gate.weight")
        num_experts = gate.shape[0] if gate is not None else 0
        if num_experts == 0 or len(tensor.shape) != 2 or tensor.shape[0] % num_experts:
            problems.append(f"{name}: {tensor.shape} is no stack of {num_experts or 'an unknown number of'} experts")
            continue
        rows = tensor.shape[0] // num_experts
        for e in range(num_experts):
            block = tensor.narrow(0, e * rows, rows)
            # Each expert's block of w2 is (F, D): the transpose of its down projection.
            out[f"{match[1]}feed_forward.experts.{e}.{match[2]}.weight"] = block.t() if match[2] == "w2" else block
    return out


class Reader(NamedTuple):
    """How a layout without model-parallel shards is recognised and read."""

    has: Callable[[str], bool]  # whether a raw name rules out all layouts that follow in READERS
    read: Callable[[Mapping[str, Lazy], list[str]], dict[str, Lazy]]  # raw tensors, problems → canonical tensors


# The layout is the first one whose `has` accepts any of the names.
READERS: dict[Layout, Reader] = {
    "hf": Reader(lambda name: name.startswith(("model.", "lm_head.")), _read_hf),
    "torrent": Reader(lambda name: ".block_sparse_moe." in name, _read_torrent),
    "quantized": Reader(is_quantized_piece, lambda raw, problems: dict(raw)),
    "official": Reader(lambda name: name.startswith(("layers.", "tok_embeddings.")), lambda raw, problems: dict(raw)),
}


def read_shards(
    implementation: Implementation, shards: Sequence[tuple[str, Mapping[str, Lazy] | None]], problems: list[str]
) -> dict[str, Lazy]:
    """Assemble canonical tensors from model-parallel shards.

    `shards` are pairs of a file name and its raw tensors, or None if the file is unreadable. A tensor that a readable
    shard lacks is reported. A tensor that is incomplete only because a shard is unreadable is left out.
    """
    stripped = [
        (file, {n.removeprefix("llma."): t for n, t in raw.items() if not IGNORED.fullmatch(n.removeprefix("llma."))})
        for file, raw in shards
        if raw is not None
    ]
    whole = len(stripped) == len(shards)
    names = dict.fromkeys(name for _, raw in stripped for name in raw)
    num_experts = max((t.shape[0] for _, raw in stripped for n, t in raw.items() if _is_gate(n)), default=0)
    out: dict[str, Lazy] = {}
    for name in names:
        holders = [(file, raw[name]) for file, raw in stripped if name in raw]
        stacked = _SPARSE_EXPERTS.fullmatch(name) if implementation == "sparse" else None
        expert_alone = implementation == "base" and expert_of(name) is not None
        if expert_alone and len(holders) > 1:
            problems.append(f"{holders[1][0]}: tensor {name} is also in {holders[0][0]}")
        if not expert_alone and len(holders) < len(stripped):
            lacking = next(file for file, raw in stripped if name not in raw)
            problems.append(f"{lacking}: tensor {name} is missing, though {holders[0][0]} has it")
            continue
        parts = [tensor for _, tensor in holders]
        if stacked:
            if whole:
                _unstack(stacked[1], stacked[2], parts, num_experts, out, problems)
            continue
        try:
            dim = cut_dim(name, implementation)
        except KeyError:
            problems.append(f"unexpected tensor {name} {parts[0].shape}")
            continue
        if dim is None:
            out[name] = parts[0]
        elif whole:
            _join(name, parts, dim, out, problems)
    return out


def _is_gate(name: str) -> bool:
    return name.endswith("feed_forward.gate.weight")


def _join(name: str, parts: Sequence[Lazy], dim: int, out: dict[str, Lazy], problems: list[str]) -> None:
    shapes = {p.shape for p in parts}
    if len(shapes) > 1 or len({p.dtype_name for p in parts}) > 1 or len(parts[0].shape) <= dim:
        kinds = sorted({f"{p.shape} {p.dtype_name}" for p in parts})
        problems.append(f"{name}: its shards do not belong together: {', '.join(kinds)}")
    else:
        out[name] = concat(parts, dim)


def _unstack(
    layer: str, which: str, parts: Sequence[Lazy], num_experts: int, out: dict[str, Lazy], problems: list[str]
) -> None:
    """Split sparse shards into experts. Shard r of n is (E·F/n, D): expert by expert, F/n rows from row r·F/n on.

    w2 is stored transposed.
    """
    rows = parts[0].shape[0] // num_experts if num_experts else 0
    if num_experts == 0 or parts[0].shape[0] % num_experts:
        problems.append(f"{layer}feed_forward.{which}: {parts[0].shape} is no stack of {num_experts} experts")
        return
    if len({(p.shape, p.dtype_name) for p in parts}) > 1:
        problems.append(f"{layer}feed_forward.{which}: its shards differ in shape or dtype")
        return
    for e in range(num_experts):
        expert = concat([p.narrow(0, e * rows, rows) for p in parts], 0)
        out[f"{layer}feed_forward.experts.{e}.{which}.weight"] = expert.t() if which == "w2" else expert


def mixed_shards(
    implementation: Implementation, shards: Sequence[tuple[str, Mapping[str, Lazy] | None]], *, thorough: bool
) -> str | None:
    """Check that all shards hold the same norms and routers; name the first two files that differ, None if none do.

    Unless `thorough`, it reads only those of the first layer and the final norm, so that opening stays quick.
    """
    readable = [(file, raw) for file, raw in shards if raw is not None]
    if len(readable) < 2:
        return None
    first_file, first = readable[0]
    for raw_name, tensor in first.items():
        name = raw_name.removeprefix("llma.")
        try:
            replicated = is_replicated(name, implementation)
        except KeyError:
            continue
        if not replicated or not (thorough or _CHECKED_ALWAYS.fullmatch(name)):
            continue
        for file, raw in readable[1:]:
            other = raw.get(raw_name)
            if other is not None and not _same_bytes(tensor, other):
                return f"{file}: {name} differs from that of {first_file}; these are shards of different checkpoints"
    return None


def _same_bytes(a: Lazy, b: Lazy) -> bool:
    if a.shape != b.shape or a.dtype_name != b.dtype_name:
        return False
    import torch

    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a.blocks(), b.blocks(), strict=True)
    )
