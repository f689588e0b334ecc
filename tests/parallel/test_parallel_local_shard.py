"""The local shards of ranks are boxes. They cover every tensor once per copy, however the mesh cuts it."""

import math
from collections import Counter

import pytest
import torch
from helpers.distributed import run_ranks
from helpers.training import ARGS, make_decoder, oracle_tensors

from accessory.nn.experts_base import BaseExperts
from accessory.parallel.local_shard import LocalShard, local, local_parameters, local_tensors, shard_like
from accessory.parallel.mesh import DeviceMesh

LORA = {"lora_rank": 4, "lora_targets": ("wq", "wo", "w1", "w2", "gate", "output"), "bias_tuning": True}

# (model-parallel size, implementation, mode, adapters). The data-parallel size follows from the number of ranks.
CASES = {
    2: [(2, "base", "sdp", None), (1, "sparse", "fsdp", LORA)],
    3: [(1, "base", "fsdp", None), (1, "sparse", "sdp", LORA)],  # only hidden_dim is divisible by three
    4: [(2, "base", "fsdp", LORA), (4, "base", "sdp", None), (4, "sparse", "sdp", LORA), (2, "sparse", "fsdp", None)],
}


def boxes(rank, world, cases, tensors):
    import torch.distributed as dist

    from accessory.parallel.mesh import Ranks

    out = []
    for model, implementation, mode, peft in cases:
        mesh = DeviceMesh.of(Ranks.of(dist.group.WORLD), model, "cpu")
        decoder = make_decoder(implementation, mesh, mode, peft=peft, tensors=tensors)
        found = [
            [(h.name, h.whole, h.offsets, h.tensor.clone()) for h in f(decoder)]
            for f in (local_tensors, local_parameters)
        ]
        out.append(found)
    return out


@pytest.mark.parametrize("world", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_boxes_of_all_ranks_make_the_whole_tensors(world):
    results = run_ranks(boxes, world, CASES[world], oracle_tensors())
    for number, (model, implementation, mode, peft) in enumerate(CASES[world]):
        told = (model, implementation, mode, peft)
        decoder = make_decoder(implementation, peft=peft)
        for kind, function in enumerate((local_tensors, local_parameters)):
            whole = {h.name: h.tensor for h in function(decoder)}
            filled = {name: torch.zeros_like(t) for name, t in whole.items()}
            times = {name: torch.zeros(t.shape, dtype=torch.int64) for name, t in whole.items()}
            for result in results:
                for name, shape, offsets, tensor in result[number][kind]:
                    assert shape == tuple(whole[name].shape), (told, name)
                    place = tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))
                    assert filled[name][place].shape == tensor.shape, (told, name)  # the box ends within the tensor
                    filled[name][place] = tensor
                    times[name][place] += 1
            for name, tensor in whole.items():
                assert torch.equal(filled[name], tensor), (told, name)
                # Each element of a tensor lies on the same number of ranks.
                assert times[name].min() == times[name].max() > 0, (told, name)


def test_one_process_holds_everything():
    decoder = make_decoder("sparse")
    shard = list(local_tensors(decoder))
    assert {h.name: h.whole for h in shard} == {n: tuple(t.shape) for n, t in oracle_tensors().items()}
    assert all(not any(h.offsets) for h in shard)
    assert sum(math.prod(h.whole) for h in shard) == sum(p.numel() for p in decoder.parameters())
    assert max(Counter(h.name for h in shard).values()) == 1


def test_writing_into_what_is_held_writes_the_parameter():
    decoder = make_decoder("base")
    for shard in local_tensors(decoder):
        shard.tensor.fill_(3.0)
    assert all(bool((p == 3).all()) for p in decoder.parameters())


def test_experts_of_a_part_keep_their_numbers():
    """A stack that begins at expert 2 names its tensors from 2 on. It was made so, not cut out of a whole one."""

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.feed_forward = torch.nn.Module()
            self.feed_forward.experts = BaseExperts(ARGS.dim, ARGS.hidden_dim, 2, first=2)

    names = [h.name for h in local_tensors(Layers())]
    assert names[:2] == ["feed_forward.experts.2.w1.weight", "feed_forward.experts.3.w1.weight"]


def test_a_moment_lies_where_its_parameter_does():
    shard = LocalShard("x", (4, 4), (2, 0), torch.zeros(2, 4))
    moment = torch.nn.Parameter(torch.ones(2, 4))
    adapters = shard_like(shard, moment)
    assert (adapters.name, adapters.whole, adapters.offsets) == ("x", (4, 4), (2, 0))
    assert not adapters.tensor.requires_grad
    assert adapters.tensor.data_ptr() == moment.data_ptr() == local(moment).data_ptr()
