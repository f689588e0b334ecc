"""A server of a model on two ranks, one of which dies; and ranks of a launcher, which nobody can start again."""

from __future__ import annotations

import pytest
from helpers.rank_kills import kill_in_step
from helpers.serving import check_error, eventually, serving

from accessory.engine.executor import OUT_OF_STEP, GroupExecutor
from accessory.errors import RankError
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper

ASK = {"prompt": "A", "max_tokens": 8, "temperature": 0}


@pytest.mark.slow
def test_a_rank_that_dies(folders, model, monkeypatch):
    expected = model.generate(["A"], max_gen_len=8)[0]
    how = {"gpus": 2, "device": "cpu", "dtype": "fp32", "max_seq_len": 256}
    with MultiGpuWrapper(folders[0], **how) as wrapper, serving(wrapper) as server:
        assert server.post("/v1/completions", **ASK).json()["choices"][0]["text"] == expected
        with monkeypatch.context() as patch:
            kill_in_step(wrapper, patch, 3)
            answer = server.post("/v1/completions", **ASK, n=2)
            assert check_error(answer, 503)["code"] == "ranks_lost"
            assert "retry-after" in answer.headers
        eventually(lambda: server.raw.get("/health").status_code == 200, 120)
        assert server.post("/v1/completions", **ASK).json()["choices"][0]["text"] == expected
        server.settle()


def test_health_tells_of_ranks_that_do_not_start_again(server, monkeypatch):
    engine = server.thread.engine

    def lost(*_):
        raise RankError("rank 1 was killed")

    with monkeypatch.context() as patch:
        patch.setattr(engine.executor, "submit", lost)
        patch.setattr(engine.executor, "recover", lost)
        check_error(server.post("/v1/completions", **ASK), 503)
        eventually(lambda: server.raw.get("/health").status_code == 503)
        assert server.raw.get("/health").json() == {"status": "failed", "reason": "rank 1 was killed"}
    assert server.post("/v1/completions", **ASK).status_code == 200  # they were started by the request
    eventually(lambda: server.raw.get("/health").status_code == 200)


@pytest.mark.parametrize("warmed_up", [True, False])
def test_ranks_that_run_again_are_warmed_up_before_they_count(server, monkeypatch, warmed_up):
    engine, seen = server.thread.engine, []

    def lost(*_):
        raise RankError("rank 1 was killed")

    monkeypatch.setattr(server.model, "warmed_up", warmed_up, raising=False)
    monkeypatch.setattr(server.model, "warm_up", lambda: seen.append(server.thread.failure), raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(engine.executor, "submit", lost)
        check_error(server.post("/v1/completions", **ASK), 503)
        eventually(lambda: server.raw.get("/health").status_code == 200)
    assert seen == (["rank 1 was killed"] if warmed_up else [])


def test_ranks_of_a_launcher_do_not_recover():
    executor = GroupExecutor.__new__(GroupExecutor)
    import threading

    executor.broken = threading.Event()
    executor.recover()
    executor.drop()
    with pytest.raises(RankError, match=OUT_OF_STEP):
        executor.recover()
