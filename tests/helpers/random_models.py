"""Random networks in transformers' implementation (the oracle), and the same weights under our names."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from accessory.config import Implementation, ModelArgs
from accessory.data.tokenizer import MIXTRAL_TOKENIZER
from accessory.nn.decoder import Decoder


def hf_mixtral(args: ModelArgs, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.05):
    """transformers' MixtralForCausalLM of these sizes; a large `std` makes routing decisive."""
    from transformers import MixtralConfig, MixtralForCausalLM

    rope = {"rope_theta": args.rope_theta, **(args.rope_scaling or {"rope_type": "default"})}
    config = MixtralConfig(
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        head_dim=args.head_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=args.max_seq_len,
        num_local_experts=args.moe.num_experts,
        num_experts_per_tok=args.moe.num_experts_per_tok,
        initializer_range=std,
        tie_word_embeddings=False,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    model = MixtralForCausalLM(config).to(dtype).eval()
    with torch.no_grad():  # no norm weight is one, so that a forgotten norm shows
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.add_(torch.randn_like(p) * 0.1)
    return model


def decisive(oracle):
    """Give the routers wide gaps between experts, so that few tokens are at a near tie."""
    with torch.no_grad():
        for layer in oracle.model.layers:
            layer.mlp.gate.weight.mul_(8)
    return oracle


def write_speaking(folder: Path, args: ModelArgs, std: float = 0.2) -> None:
    """Saves the network of `hf_mixtral` as transformers does, and adds Mixtral's tokenizer."""
    hf_mixtral(args, std=std).save_pretrained(folder)
    shutil.copy(MIXTRAL_TOKENIZER, folder / "tokenizer.model")


def half_to_interleaved(rows: Tensor, heads: int) -> Tensor:
    """Reorders Hugging Face's half-split rotary rows, (heads · d, …), into interleaved pairs, row by row."""
    d = rows.shape[0] // heads
    order = [h * d + (j // 2) + (d // 2) * (j % 2) for h in range(heads) for j in range(d)]
    return rows[order]


def canonical_from_hf(model) -> dict[str, Tensor]:
    """The oracle's weights under canonical names (whole tensors, one for each expert)."""
    c, out = model.config, {}
    state = {k: v.detach() for k, v in model.state_dict().items()}
    out["tok_embeddings.weight"] = state["model.embed_tokens.weight"]
    out["output.weight"] = state["lm_head.weight"]
    out["norm.weight"] = state["model.norm.weight"]
    for i in range(c.num_hidden_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        out[ours + "attention_norm.weight"] = state[theirs + "input_layernorm.weight"]
        out[ours + "ffn_norm.weight"] = state[theirs + "post_attention_layernorm.weight"]
        for letter, heads in (("q", c.num_attention_heads), ("k", c.num_key_value_heads)):
            rows = state[theirs + f"self_attn.{letter}_proj.weight"]
            out[ours + f"attention.w{letter}.weight"] = half_to_interleaved(rows, heads)
        for letter in "vo":
            out[ours + f"attention.w{letter}.weight"] = state[theirs + f"self_attn.{letter}_proj.weight"]
        out[ours + "feed_forward.gate.weight"] = state[theirs + "mlp.gate.weight"]
        for e in range(c.num_local_experts):
            gate_up = state[theirs + "mlp.experts.gate_up_proj"][e]
            expert = ours + f"feed_forward.experts.{e}."
            out[expert + "w1.weight"], out[expert + "w3.weight"] = gate_up.chunk(2)
            out[expert + "w2.weight"] = state[theirs + "mlp.experts.down_proj"][e]
    return out


def decoder_from_canonical(
    args: ModelArgs, implementation: Implementation, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> Decoder:
    """A decoder filled without the project's loader, so that tests of the network do not depend on the loader."""
    decoder = Decoder(args, implementation).cast(dtype).eval()
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if ".experts." in name:
                head, kind = name.rsplit(".", 1)
                for e in range(args.moe.num_experts):
                    p[e].copy_(tensors[f"{head}.{e}.{kind}.weight"])
            else:
                p.copy_(tensors[name])
    return decoder
