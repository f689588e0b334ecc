"""Adapters for tests: random LoRA, biases and norms for the canonical tensors of `helpers.checkpoints`."""

from __future__ import annotations

from pathlib import Path

import torch

from accessory.checkpoint.lazy import Constant
from accessory.checkpoint.save import write_checkpoint
from accessory.config import ModelArgs
from helpers.checkpoints import ARGS, Tensors

SEVEN = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def linears(args: ModelArgs, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Canonical linear → (rows, columns) of its weight."""
    q, kv, d, f = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, args.dim, args.hidden_dim
    sizes = {"wq": (q, d), "wk": (kv, d), "wv": (kv, d), "wo": (d, q), "w1": (f, d), "w2": (d, f), "w3": (f, d)}
    out = {}
    for i in range(args.n_layers):
        for t in targets:
            if t in ("w1", "w2", "w3"):
                for e in range(args.moe.num_experts):
                    out[f"layers.{i}.feed_forward.experts.{e}.{t}"] = sizes[t]
            elif t == "gate":
                out[f"layers.{i}.feed_forward.gate"] = (args.moe.num_experts, d)
            elif t != "output":
                out[f"layers.{i}.attention.{t}"] = sizes[t]
    return out | ({"output": (args.vocab_size, d)} if "output" in targets else {})


def random_adapter(
    args: ModelArgs = ARGS,
    *,
    targets: tuple[str, ...] = SEVEN,
    rank: int = 4,
    std: float = 0.1,
    seed: int = 0,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, (rows, columns) in linears(args, targets).items():
        out[f"{name}.lora_a.weight"] = torch.randn(rank, columns, generator=generator) * std
        out[f"{name}.lora_b.weight"] = torch.randn(rows, rank, generator=generator) * std
        if bias and name != "output":
            out[f"{name}.bias"] = torch.randn(rows, generator=generator) * std
    return {name: tensor.to(dtype) for name, tensor in out.items()}


def peft_args(args: ModelArgs = ARGS, *, alpha: float | None = 6.0, rank: int = 4, **changes) -> ModelArgs:
    return args.replace(**{"lora_rank": rank, "lora_alpha": alpha, **changes})


def save_adapter(folder: Path, tensors: Tensors, args: ModelArgs, *, to: str = "base", shards: int = 1) -> Path:
    lazies = {name: Constant(tensor) for name, tensor in tensors.items()}
    write_checkpoint(folder, lazies, args, to=to, shards=shards, allow_partial=True, progress=False)
    return folder
