"""Sizes of the networks that tests are about: as small as the question allows."""

from __future__ import annotations

from accessory.config import ModelArgs, MoEArgs

# Two layers whose widths differ, so that one taken for another shows. Whoever changes dim or n_heads gives head_dim
# too: `replace` does not work it out again.
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
# Groups of every quantised format survive being cut among four ranks.
CUTTABLE = TINY.replace(dim=512, hidden_dim=512, n_heads=8, n_kv_heads=4, head_dim=64)
# With Mixtral's vocabulary, for tests that begin or end in text; up to four ranks can share its heads.
SPEAKING = TINY.replace(n_heads=8, n_kv_heads=4, head_dim=4, vocab_size=32000, max_seq_len=512)
