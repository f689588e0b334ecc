"""`build` for a group of one rank."""

import torch
from helpers.checkpoints import ARGS, random_tensors, write_hf

from accessory.build.network import NetworkSpec, build
from accessory.checkpoint.folder import open_checkpoint
from accessory.parallel.mesh import DeviceMesh, Ranks


def test_a_group_of_one_rank_has_no_collectives(tmp_path):
    """There is no process group here, so a collective would fail."""
    checkpoint = open_checkpoint(write_hf(tmp_path / "model", random_tensors(ARGS), ARGS))
    spec = NetworkSpec(checkpoints=[checkpoint], args=ARGS, implementation="sparse")
    alone, grouped = build(spec), build(spec, DeviceMesh(model=Ranks(None, 0, 1)))
    assert grouped.local_shards == {}
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(grouped(ids).logits, alone(ids).logits)
