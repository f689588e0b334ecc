import logging

import pytest

from accessory.config import PRESETS, ModelArgs
from accessory.errors import ConfigError
from accessory.nn.decoder import Decoder
from accessory.parallel import sharding
from accessory.parallel.apply import parallelize
from accessory.parallel.mesh import Ranks, first_host, launch_of


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        (
            {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "7"},
            (5, 8, 1, "n1", 7),
        ),
        (
            {
                "SLURM_PROCID": "9",
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "16",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_NODELIST": "gpu[03-05]",
                "SLURM_JOB_ID": "12345",
            },
            (9, 16, 1, "gpu03", 29845),
        ),
        # Inside an allocation but not started by srun: one process of its own.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),
    ],
)
def test_launchers_variables(environment, expected):
    launch = launch_of(environment)
    found = None if launch is None else (launch.rank, launch.size, launch.local_rank, launch.address, launch.port)
    assert found == expected


@pytest.mark.parametrize("bad", [{"WORLD_SIZE": "x", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "2"}])
def test_nonsense_names_the_variable(bad):
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        launch_of(bad)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[03-05,9],cpu1", "gpu03"), ("a1,a2", "a1"), ("node7", "node7"), ("n-a[1,2]", "n-a1"), ("", "127.0.0.1")],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


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
