import logging

import pytest

from accessory.config import PRESETS, ModelArgs
from accessory.errors import ConfigError
from accessory.nn.decoder import Decoder
from accessory.parallel import sharding
from accessory.parallel.apply import parallelize
from accessory.parallel.mesh import Ranks

SMALL = ModelArgs(dim=64, hidden_dim=96, n_layers=1, n_heads=8, n_kv_heads=2, vocab_size=64)


def cut(args, implementation, rank, world):
    return parallelize(Decoder(args, implementation), Ranks(None, rank, world))


def test_heads_are_cut_shared_or_kept_whole(caplog):
    assert [sharding.attention_mode(SMALL, n) for n in (1, 2, 4, 8)] == ["cut", "cut", "kv replicated", "kv replicated"]
    layer = cut(SMALL, "sparse", 5, 8).layers[0]
    assert layer.attention.wq.weight.shape == (8, 64)
    assert layer.attention.wk.weight.shape == (8, 64)  # one whole head, the second: rank 5 · 2 heads // 8 ranks
    assert sharding.rank_part("layers.0.attention.wk.weight", (16, 64), SMALL, "sparse", 5, 8) == sharding.Slice(
        0, 8, 8
    )
    odd = SMALL.replace(n_heads=9, n_kv_heads=3, head_dim=8)
    with caplog.at_level(logging.WARNING):
        layer = cut(odd, "sparse", 0, 2).layers[0]
    assert "n_heads = 9" in caplog.text
    assert layer.attention.wq.weight.shape == (72, 64)
    assert layer.feed_forward.experts.w2.shape == (8, 64, 48)


@pytest.mark.parametrize(
    ("changes", "implementation", "world", "field"),
    [
        ({"hidden_dim": 100}, "sparse", 8, "hidden_dim: got 100.* 8"),
        ({}, "base", 16, r"moe.num_experts: got 8.* 16"),
        ({"vocab_size": 63}, "base", 2, "vocab_size: got 63.* 2"),
        ({"dim": 72, "head_dim": 8}, "sparse", 16, "dim: got 72.* 16"),
    ],
)
def test_what_cannot_be_cut_names_the_field_and_both_numbers(changes, implementation, world, field):
    with pytest.raises(ConfigError, match=field):
        cut(SMALL.replace(**changes), implementation, 0, world)


@pytest.mark.parametrize("preset", ["8x7b", "8x22b"])
@pytest.mark.parametrize("implementation", ["base", "sparse"])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_real_sizes_can_be_cut(preset, implementation, world):
    sharding.check_ranks(PRESETS[preset], implementation, world)
    assert sharding.attention_mode(PRESETS[preset], world) == "cut"
