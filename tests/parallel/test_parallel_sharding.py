"""The table of cuts against the published description of the shards (written by hand in the helpers)."""

import pytest
import torch
from helpers.checkpoints import ARGS, companions, random_tensors, shard

from accessory.config import MIXTRAL_8X7B, MIXTRAL_8X22B, ConfigError, MoEArgs
from accessory.parallel.sharding import (
    WHOLE,
    Slice,
    check_world,
    cut_dim,
    expert_of,
    is_replicated,
    largest_world,
    rank_slice,
)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_base_slices_are_what_the_shards_hold(world):
    tensors = {**random_tensors(), **companions()}
    for rank in range(world):
        held = {}
        for name, tensor in tensors.items():
            piece = rank_slice(name, tensor.shape, "base", rank, world, ARGS.moe.num_experts)
            if piece is not None:
                held[name] = tensor if piece.dim is None else tensor.narrow(piece.dim, piece.start, piece.length)
        expected = shard(tensors, "base", rank, world)
        assert held.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(held[name], tensor), name


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_sparse_slices_stack_up_to_what_the_shards_hold(world):
    tensors = random_tensors()
    for rank in range(world):
        expected = shard(tensors, "sparse", rank, world)
        stacks = {}
        for name, tensor in tensors.items():
            piece = rank_slice(name, tensor.shape, "sparse", rank, world, ARGS.moe.num_experts)
            assert piece is not None
            part = tensor if piece.dim is None else tensor.narrow(piece.dim, piece.start, piece.length)
            if expert_of(name) is None:
                assert torch.equal(part, expected[name]), name
            else:
                layer, w = name.split("feed_forward.")[0], name.split(".")[-2]
                stacks.setdefault(f"{layer}feed_forward.{w}", []).append(part.t() if w == "w2" else part)
        for name, parts in stacks.items():
            assert torch.equal(torch.cat(parts), expected[name]), name


def test_slices_of_all_ranks_make_the_whole():
    for implementation in ("base", "sparse"):
        for name, tensor in {**random_tensors(), **companions()}.items():
            pieces = [rank_slice(name, tensor.shape, implementation, r, 4, ARGS.moe.num_experts) for r in range(4)]
            if is_replicated(name, implementation):
                assert pieces == [WHOLE] * 4
            elif cut_dim(name, implementation) is None:
                assert sorted(p is None for p in pieces) == [False, True, True, True]
            else:
                assert [p.start for p in pieces] == [r * p.length for r, p in enumerate(pieces)]
                assert sum(p.length for p in pieces) == tensor.shape[pieces[0].dim]


def test_sparse_companions_follow_their_linear():
    args = ("sparse", 1, 2, 8)
    prefix = "layers.0.feed_forward.experts.3."
    assert rank_slice(prefix + "w1.lora_b.weight", (40, 3), *args) == Slice(0, 20, 20)
    assert rank_slice(prefix + "w1.lora_a.weight", (3, 48), *args) == WHOLE
    assert rank_slice(prefix + "w2.lora_a.weight", (3, 40), *args) == Slice(1, 20, 20)
    assert rank_slice(prefix + "w2.bias", (48,), *args) == WHOLE


def test_sizes_that_do_not_divide_name_tensor_and_numbers():
    with pytest.raises(ConfigError, match=r"output\.weight: dimension 0: got 33, .*multiple.* 2"):
        rank_slice("output.weight", (33, 8), "base", 0, 2, 8)
    with pytest.raises(ConfigError, match=r"moe\.num_experts: got 8, .*3"):
        rank_slice("layers.0.feed_forward.experts.0.w1.weight", (8, 8), "base", 0, 3, 8)
    with pytest.raises(ConfigError, match=r"hidden_dim: got 40, .*16"):
        check_world(ARGS, "sparse", 16)
    with pytest.raises(ConfigError, match=r"moe\.num_experts: got 8, .*16"):
        check_world(ARGS, "base", 16)
    with pytest.raises(ConfigError, match="shards: got 0"):
        check_world(ARGS, "base", 0)
    with pytest.raises(KeyError):
        cut_dim("layers.0.attention.wx.weight", "base")


def test_default_worlds():
    for args in (MIXTRAL_8X7B, MIXTRAL_8X22B):
        assert largest_world(args, "base") == largest_world(args, "sparse") == 8
    assert largest_world(ARGS.replace(moe=MoEArgs(num_experts=4)), "base") == 4
    assert largest_world(ARGS.replace(moe=MoEArgs(num_experts=3)), "base") == 1
    assert largest_world(ARGS.replace(hidden_dim=42), "sparse") == 2
