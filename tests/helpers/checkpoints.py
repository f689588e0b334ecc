"""Checkpoints for tests: random canonical tensors, and writers of each layout that share no code with the package.

The writers follow the published descriptions of the layouts in plain torch, so that the package's readers are tested
against independent code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from accessory.config import ModelArgs, MoEArgs
from helpers.sizes import TINY

Tensors = dict[str, Tensor]

# 8 divides every size, no two sizes are alike, and heads × head_dim is not dim.
ARGS = TINY.replace(dim=48, hidden_dim=40, head_dim=8, vocab_size=80, moe=MoEArgs())


def random_tensors(args: ModelArgs = ARGS, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    d, f, q, kv = args.dim, args.hidden_dim, args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    out = {"tok_embeddings.weight": make(args.vocab_size, d)}
    for i in range(args.n_layers):
        out[f"layers.{i}.attention.wq.weight"] = make(q, d)
        out[f"layers.{i}.attention.wk.weight"] = make(kv, d)
        out[f"layers.{i}.attention.wv.weight"] = make(kv, d)
        out[f"layers.{i}.attention.wo.weight"] = make(d, q)
        out[f"layers.{i}.feed_forward.gate.weight"] = make(args.moe.num_experts, d)
        for e in range(args.moe.num_experts):
            out[f"layers.{i}.feed_forward.experts.{e}.w1.weight"] = make(f, d)
            out[f"layers.{i}.feed_forward.experts.{e}.w2.weight"] = make(d, f)
            out[f"layers.{i}.feed_forward.experts.{e}.w3.weight"] = make(f, d)
        out[f"layers.{i}.attention_norm.weight"] = make(d)
        out[f"layers.{i}.ffn_norm.weight"] = make(d)
    out["norm.weight"] = make(d)
    out["output.weight"] = make(args.vocab_size, d)
    return out


def companions(args: ModelArgs = ARGS, *, rank: int = 3, seed: int = 1) -> Tensors:
    """Biases and LoRA of every layer: for a column-parallel linear, a row-parallel one, w1 and w2 of each expert."""
    generator = torch.Generator().manual_seed(seed)
    q, d, f = args.n_heads * args.head_dim, args.dim, args.hidden_dim
    linears = {"attention.wq": (q, d), "attention.wo": (d, q)}
    for e in range(args.moe.num_experts):
        linears |= {f"feed_forward.experts.{e}.w1": (f, d), f"feed_forward.experts.{e}.w2": (d, f)}
    out = {}
    for i in range(args.n_layers):
        for name, (rows, columns) in linears.items():
            out[f"layers.{i}.{name}.bias"] = torch.randn(rows, generator=generator)
            out[f"layers.{i}.{name}.lora_a.weight"] = torch.randn(rank, columns, generator=generator)
            out[f"layers.{i}.{name}.lora_b.weight"] = torch.randn(rows, rank, generator=generator)
    return out


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def params_json(args: ModelArgs = ARGS) -> dict[str, Any]:
    return {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "head_dim": args.head_dim,
        "hidden_dim": args.hidden_dim,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "norm_eps": args.norm_eps,
        "vocab_size": args.vocab_size,
        "rope_theta": args.rope_theta,
        "moe": {"num_experts_per_tok": args.moe.num_experts_per_tok, "num_experts": args.moe.num_experts},
    }


def write_torrent(folder: Path, tensors: Tensors, args: ModelArgs = ARGS, *, params: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    raw: Tensors = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            raw[name.replace("feed_forward.gate", "block_sparse_moe.gate")] = tensor.clone()
    for i in range(args.n_layers):
        for w in ("w1", "w2", "w3"):
            blocks = [tensors[f"layers.{i}.feed_forward.experts.{e}.{w}.weight"] for e in range(args.moe.num_experts)]
            blocks = [b.t() if w == "w2" else b for b in blocks]
            raw[f"layers.{i}.block_sparse_moe.{w}"] = torch.cat(blocks).contiguous()
    torch.save(raw, folder / "consolidated.00.pth")
    if params:
        write_json(folder / "params.json", params_json(args))
    return folder


def split_into_pieces(file: Path, count: int) -> None:
    """Cuts `file` into -split0, -split1, …, to be concatenated, as the 87 GB file was published.

    The pieces have odd sizes, so that cuts go through tensors and elements.
    """
    data = file.read_bytes()
    size = -(-len(data) // count) | 1
    for i in range(count):
        file.with_name(f"{file.name}-split{i}").write_bytes(data[i * size : (i + 1) * size])
    file.unlink()


def write_official(folder: Path, tensors: Tensors, args: ModelArgs = ARGS, *, form: str = "pth") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if form == "safetensors":
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "consolidated.safetensors")
    elif form == "pth":
        torch.save(tensors, folder / "consolidated.00.pth")
    else:
        for r in range(8):
            part = {n: t for k, (n, t) in enumerate(tensors.items()) if k % 8 == r}
            torch.save(part, folder / f"consolidated.{r:02d}.pt")
    write_json(folder / "params.json", params_json(args))
    return folder


def half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Puts rows of interleaved rotary pairs into Hugging Face's order, as its conversion script does."""
    rows, columns = weight.shape
    return weight.view(n_heads, rows // n_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def hf_tensors(tensors: Tensors, args: ModelArgs = ARGS, *, fused: bool = False) -> Tensors:
    out: Tensors = {
        "model.embed_tokens.weight": tensors["tok_embeddings.weight"],
        "model.norm.weight": tensors["norm.weight"],
        "lm_head.weight": tensors["output.weight"],
    }
    for i in range(args.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        out[theirs + "self_attn.q_proj.weight"] = half_split(tensors[ours + "attention.wq.weight"], args.n_heads)
        out[theirs + "self_attn.k_proj.weight"] = half_split(tensors[ours + "attention.wk.weight"], args.n_kv_heads)
        out[theirs + "self_attn.v_proj.weight"] = tensors[ours + "attention.wv.weight"]
        out[theirs + "self_attn.o_proj.weight"] = tensors[ours + "attention.wo.weight"]
        out[theirs + "input_layernorm.weight"] = tensors[ours + "attention_norm.weight"]
        out[theirs + "post_attention_layernorm.weight"] = tensors[ours + "ffn_norm.weight"]
        experts = [
            {w: tensors[f"{ours}feed_forward.experts.{e}.{w}.weight"] for w in ("w1", "w2", "w3")}
            for e in range(args.moe.num_experts)
        ]
        gate = tensors[ours + "feed_forward.gate.weight"]
        if fused:
            out[theirs + "mlp.gate.weight"] = gate
            out[theirs + "mlp.experts.gate_up_proj"] = torch.stack([torch.cat([x["w1"], x["w3"]]) for x in experts])
            out[theirs + "mlp.experts.down_proj"] = torch.stack([x["w2"] for x in experts])
        else:
            out[theirs + "block_sparse_moe.gate.weight"] = gate
            for e, expert in enumerate(experts):
                for w, tensor in expert.items():
                    out[f"{theirs}block_sparse_moe.experts.{e}.{w}.weight"] = tensor
    return out


def hf_config(args: ModelArgs = ARGS) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "max_position_embeddings": args.max_seq_len,
        "num_local_experts": args.moe.num_experts,
        "num_experts_per_tok": args.moe.num_experts_per_tok,
    }


def write_hf(
    folder: Path,
    tensors: Tensors,
    args: ModelArgs = ARGS,
    *,
    files: int = 1,
    fused: bool = False,
    tied: bool = False,
    index: bool = True,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    raw = hf_tensors(tensors, args, fused=fused)
    if tied:
        del raw["lm_head.weight"]
    write_json(folder / "config.json", {**hf_config(args), "tie_word_embeddings": tied})
    if files == 1:
        save_file(raw, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"model-{k % files + 1:05d}-of-{files:05d}.safetensors" for k, name in enumerate(raw)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in raw.items() if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    if index:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def shard(tensors: Tensors, implementation: str, rank: int, world: int, args: ModelArgs = ARGS) -> Tensors:
    """The tensors of shard `rank` of `world`, names without prefix, by the original's table."""

    def chunk(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(world, dim)[rank].contiguous()

    out: Tensors = {}
    for name, tensor in tensors.items():
        owner, _, kind = name.partition(".attention.")[2].partition(".")
        if ".experts." in name:
            continue
        if name == "tok_embeddings.weight":
            out[name] = chunk(tensor, 1)
        elif name == "output.weight":
            out[name] = chunk(tensor, 0)
        elif owner in ("wq", "wk", "wv"):
            out[name] = tensor if kind == "lora_a.weight" else chunk(tensor, 0)
        elif owner == "wo":
            out[name] = chunk(tensor, 1) if kind in ("weight", "lora_a.weight") else tensor
        else:
            out[name] = tensor
    per_rank = args.moe.num_experts // world
    if implementation == "base":
        for name, tensor in tensors.items():
            if ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) // per_rank == rank:
                out[name] = tensor
        return out
    rows = args.hidden_dim // world
    for i in range(args.n_layers):
        for w in ("w1", "w2", "w3"):
            experts = [tensors[f"layers.{i}.feed_forward.experts.{e}.{w}.weight"] for e in range(args.moe.num_experts)]
            by_row = [x.t() if w == "w2" else x for x in experts]
            own = [x[rank * rows : (rank + 1) * rows] for x in by_row]
            out[f"layers.{i}.feed_forward.{w}"] = torch.cat(own).contiguous()
    return out


def write_accessory(
    folder: Path,
    tensors: Tensors,
    implementation: str,
    args: ModelArgs = ARGS,
    *,
    world: int = 8,
    nested: bool = True,
    prefix: str = "llma.",
    safetensors: bool = False,
    meta: bool = True,
    config: bool = True,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(world):
        raw = {prefix + n: t.clone() for n, t in shard(tensors, implementation, rank, world, args).items()}
        stem = folder / f"consolidated.{rank:02d}-of-{world:02d}.model"
        if safetensors:
            save_file(raw, f"{stem}.safetensors")
        else:
            torch.save({"model": raw} if nested else raw, f"{stem}.pth")
    if config:
        write_json(folder / "config.json", args.to_dict())
    if meta:
        write_json(folder / "meta.json", {"llama_type": "mixtral" + ("_sparse" if implementation == "sparse" else "")})
    return folder
