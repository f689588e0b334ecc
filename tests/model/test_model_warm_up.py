"""`warm_up` of a model: nothing on a CPU; where kernels are compiled, steps of every kind, on one rank or several."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers.distributed import run_ranks
from helpers.seeing import write_seeing
from helpers.vision import tiny_sphinx

from accessory.engine.scheduler import Counts
from accessory.model.meta import MetaModel
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper

PROMPT = "The best programming language in the world is"
HOW = {"dtype": torch.float32, "device": "cpu", "max_seq_len": 130}


@pytest.fixture(autouse=True)
def _few_sequences(monkeypatch):
    monkeypatch.setattr("accessory.engine.warm_up.GRAPH_BUCKETS", (1, 2, 4))


def steps_of(engine):
    """The plans that the engine submits from now on."""
    plans, submit = [], engine.executor.submit

    def submitted(plan):
        plans.append(plan)
        return submit(plan)

    engine.executor.submit = submitted
    return plans


def check_nothing_stays(engine):
    pool = engine.scheduler.pool
    assert pool.free == pool.pages - 1
    assert not pool._content
    assert engine.scheduler.counts == Counts()


def test_on_a_cpu_nothing_is_computed(speaking):
    model = MetaModel.from_pretrained(speaking, **HOW)
    plans = steps_of(model.engine())
    model.warm_up()
    assert not plans


def test_where_kernels_are_compiled_answers_are_the_same_afterwards(speaking):
    model = MetaModel.from_pretrained(speaking, **HOW)
    expected = MetaModel.from_pretrained(speaking, **HOW).generate([PROMPT, "A"], max_gen_len=8)
    model.engine().compiles = True
    plans = steps_of(model.engine())
    model.warm_up()
    assert plans
    check_nothing_stays(model.engine())
    assert model.generate([PROMPT, "A"], max_gen_len=8) == expected


@pytest.mark.parametrize(("max_seq_len", "images"), [(130, 1), (4, 0)])
def test_an_image_is_encoded_where_there_is_room_for_one(tmp_path, max_seq_len, images):
    folder = write_seeing(tmp_path / "model", vision=tiny_sphinx())
    model = MetaModel.from_pretrained(folder, with_visual=True, **{**HOW, "max_seq_len": max_seq_len})
    model.engine().compiles = True
    model.warm_up()
    assert model.tower is not None
    assert bool(model.tower.runs) == bool(images)
    check_nothing_stays(model.engine())


def on_ranks(rank, world, folder):
    """Every rank calls `warm_up`; then the first one leads, as in a server. What is left each time, and an answer."""
    found = []
    model = MetaModel.from_pretrained(folder, mp_group=dist.group.WORLD, **HOW)
    if rank == 0:
        model.engine().compiles = True
        plans = steps_of(model.engine())
    model.warm_up()
    found.append(model.generate([PROMPT], max_gen_len=4))
    if rank:
        model.follow()
        return found
    with model.lead():
        model.engine().scheduler.counts = Counts()
        before = len(plans)
        model.warm_up()
        assert len(plans) > before > 30
        check_nothing_stays(model.engine())
        found.append(model.generate([PROMPT], max_gen_len=4))
    return found


@pytest.mark.slow
def test_ranks_of_a_group_warm_up_together(speaking):
    first, second = run_ranks(on_ranks, 2, speaking)
    alone = MetaModel.from_pretrained(speaking, **HOW).generate([PROMPT], max_gen_len=4)
    assert first == [alone, alone]
    assert second == [alone]


@pytest.mark.slow
def test_ranks_of_a_driver_warm_up(cut_folder):
    expected = MetaModel.from_pretrained(cut_folder, **HOW).generate([PROMPT], max_gen_len=4)
    with MultiGpuWrapper(cut_folder, gpus=2, **HOW) as wrapper:
        plans = steps_of(wrapper.engine())
        wrapper.warm_up()
        assert not plans
        wrapper.engine().compiles = True
        wrapper.warm_up()
        assert plans
        check_nothing_stays(wrapper.engine())
        assert wrapper.generate([PROMPT], max_gen_len=4) == expected
