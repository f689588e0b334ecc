"""Sizes of the networks in tests, as small as each test allows."""

from __future__ import annotations

from accessory.config import ModelArgs, MoEArgs

# Two layers, and widths that all differ, so that a mistaken width shows. If you change dim or n_heads, give head_dim
# too: `replace` does not compute it again.
TINY = ModelArgs(
    dim=32,
    hidden_dim=48,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=64,
    max_seq_len=64,
    moe=MoEArgs(num_experts=4),
)
# Four ranks can cut these weights without cutting through a group of any quantised format.
CUTTABLE = TINY.replace(dim=512, hidden_dim=512, n_heads=8, n_kv_heads=4, head_dim=64)
# With Mixtral's vocabulary, for tests that begin or end in text; up to four ranks can share its attention heads.
SPEAKING = TINY.replace(n_heads=8, n_kv_heads=4, head_dim=4, vocab_size=32000, max_seq_len=512)
