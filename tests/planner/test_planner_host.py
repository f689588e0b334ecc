"""What a plan needs of a machine besides its GPUs."""

from helpers.plans import TINY, finetuning, running

from accessory.planner.encoders import encoders_bytes
from accessory.planner.host import disk_bytes, host_bytes
from accessory.planner.weights import projection_groups
from accessory.vision_config import SPHINX


def test_disk_of_a_finetune():
    setup = finetuning(TINY, kind="full")
    total = TINY.parameter_counts()[0]
    assert disk_bytes(setup, 1234) == {"model": 1234, "states": 3 * 12 * total, "result": 2 * total}
    assert disk_bytes(running(TINY)) == {"model": 2 * total}


def test_ranks_that_share_rows_or_experts_write_the_same_states():
    alone, shared = (disk_bytes(finetuning(TINY, kind="full", **ranks)) for ranks in ({}, {"dp": 4, "cp": 2, "ep": 2}))
    assert alone == shared


def test_disk_holds_encoders():
    more = disk_bytes(running(views=1))["model"] - disk_bytes(running())["model"]
    projections = sum(group.numel for group in projection_groups(running(views=1)))
    assert more == encoders_bytes(SPHINX) + 2 * projections
    assert disk_bytes(running(views=1), model=5)["model"] == 5


def test_ranks_of_one_machine_share_its_memory():
    one = host_bytes(running())
    assert host_bytes(running(tp=4)) == 4 * one
    assert host_bytes(finetuning(kind="full", dp=16)) == host_bytes(finetuning(kind="full", dp=8)) > 8 * one
