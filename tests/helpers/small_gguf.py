"""A tiny Llama in a GGUF file, for demos that begin with upcycling one."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from helpers.small_tokenizers import CHATML

D, F, H, G, LAYERS, VOCAB = 32, 48, 8, 8, 2, 264


def write_small_gguf(path: Path) -> None:
    """A random Llama whose sizes 8 divides; its tokenizer has single bytes and ChatML's control tokens."""
    from tokenizers import pre_tokenizers

    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spare = [f"<spare{i}>" for i in range(VOCAB - len(control) - len(alphabet))]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(D)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(control + alphabet + spare)
    writer.add_token_types([3] * len(control) + [1] * len(alphabet) + [3] * len(spare))
    writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    shapes = {"token_embd": (VOCAB, D), "output_norm": (D,)}
    for i in range(LAYERS):
        layer = {"attn_norm": (D,), "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
        layer |= {"attn_q": (D, D), "attn_k": (D, D), "attn_v": (D, D), "attn_output": (D, D)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        mean, deviation = (1.0, 0.1) if name.endswith("norm") else (0.0, 0.2)
        writer.add_tensor(f"{name}.weight", rng.normal(mean, deviation, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
