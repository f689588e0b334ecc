"""The driver of ranks, and the engine over it, where ranks die, fail, fall silent or are closed.

The ranks are threads here that do what a test says. tests/model/test_model_multi_gpu.py kills real processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from multiprocessing import Pipe
from typing import Any

import pytest

from accessory.engine import rank_executor as module
from accessory.engine.engine import Engine
from accessory.engine.executor import RUN, SCORE
from accessory.engine.rank_executor import DONE, FAILED, REFUSED, RankExecutor
from accessory.engine.runner import About
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.scheduler import StepResult
from accessory.engine.sequence import Draw, Sequence
from accessory.errors import InputError, RankError

ABOUT = About(pages=9, max_running=4, step_tokens=128, on_cpu=True)
PROMPT = list(range(200))  # two steps of at most 128 tokens, then one a token
LOADING, DIES, SILENT = "loading", "dies", "silent"


class Rank:
    """Stands for a RankProcess. `script` maps (kind of message, its number) to what the rank does then.

    computed: the second rank's part of each step. As in a real step, the first one answers only once it has that.
    """

    def __init__(self, number: int, script: dict[Any, Any], computed: threading.Semaphore) -> None:
        self.number, self._script, self._computed = number, script, computed
        self.connection, self._mine = Pipe()
        self.alive, self.released = True, False
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _live(self) -> None:
        counts = {}
        try:
            while self.alive:
                message = self._mine.recv()
                kind = LOADING if isinstance(message, dict) else message[0]
                self.options = message if kind == LOADING else self.options
                number = counts[kind] = counts.get(kind, -1) + 1
                act = self._script.get((kind, number))
                if act == SILENT:
                    continue
                if act == DIES:
                    self.kill()
                elif act is not None:
                    self._mine.send(act)
                elif kind == LOADING:
                    self._mine.send((DONE, ABOUT))
                elif self.number == 1:
                    self._computed.release()
                elif not self._computed.acquire(timeout=5):
                    continue
                elif kind == RUN:
                    draws = [Draw(7) for entry in message[1].entries if entry.draw is not None]
                    self._mine.send((DONE, StepResult(draws, {})))
                else:
                    self._mine.send((DONE, []))
        except (EOFError, OSError):
            self.alive = False

    def limit(self, seconds: float) -> None:
        pass

    def kill(self) -> None:
        self.alive = False
        with socket.socket(
            fileno=os.dup(self._mine.fileno())
        ) as end:  # a mere close would not wake a thread that reads
            end.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        self.released = True
        self.connection.close()

    def ended(self, patience: float) -> bool:
        return not self.alive

    def how_it_ended(self) -> str:
        return f"rank {self.number} was ended by signal 9"


class Driver:
    """Starts two ranks with the next of the scripts, each time."""

    def __init__(self, *scripts: tuple[dict[Any, Any], dict[Any, Any]], ahead: int = 0) -> None:
        self.started: list[list[Rank]] = []
        self._scripts = [*scripts]
        options = {"dtype": "fp32", "progress": True}
        self.executor = RankExecutor(self._start, options, ahead=ahead, load_timeout=0.5, step_timeout=0.5)

    def _start(self, ranks: list[Rank]) -> object:
        script = self._scripts.pop(0) if self._scripts else ({}, {})
        computed = threading.Semaphore(0)
        ranks += [Rank(n, script[n], computed) for n in (0, 1)]
        self.started.append(list(ranks))
        return object()

    def engine(self) -> Engine:
        return Engine.of(self.executor, self.executor.load())


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.2)
    monkeypatch.setattr(module, "POLL", 0.02)


def ask(engine: Engine, tokens: int = 4, prompt: list[int] = PROMPT) -> list[int]:
    request = engine.add(Sequence(list(prompt), SamplingParams(), tokens))
    while not request.finished:
        engine.advance([request])
        request.drawn.clear()
    if request.error is not None:
        raise request.error
    return request.ids[len(prompt) :]


WORKS = [7, 7, 7, 7]
# What one rank says or does, and the one error that follows.
ACTS = [
    pytest.param(1, DIES, RankError, "rank 1 was ended by signal 9 while", id="the second dies"),
    pytest.param(0, DIES, RankError, "rank 0 was ended by signal 9 while", id="the first dies"),
    pytest.param(1, (FAILED, "RuntimeError: no", "trace"), RankError, "rank 1 failed while", id="the second fails"),
    pytest.param(0, (FAILED, "RuntimeError: no", "trace"), RankError, "rank 0 failed while", id="the first fails"),
    pytest.param(1, (REFUSED, InputError("x")), RankError, "rank 1, while", id="the second refuses"),
    pytest.param(0, (REFUSED, InputError("mine")), InputError, "^mine$", id="the first refuses"),
    pytest.param(0, SILENT, RankError, "said nothing for 0 s while", id="the first is silent"),
]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(("number", "act", "error", "says"), ACTS)
# In a chunk of the prompt, in its last chunk, while decoding.
@pytest.mark.parametrize("step", [*(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1)), 3])
def test_a_step_that_fails_is_one_error_and_the_next_call_works(step, number, act, error, says, ahead):
    script = ({}, {})
    script[number][RUN, step] = act
    driver = Driver(script, ahead=ahead)
    engine = driver.engine()
    with pytest.raises(error, match=says) as raised:
        ask(engine)
    assert "\n" not in str(raised.value)
    assert all(rank.released for rank in driver.started[0])
    assert ask(engine) == WORKS
    assert len(driver.started) == 2
    assert engine.scheduler.pool.free == ABOUT.pages - 1


@pytest.mark.parametrize(("number", "act", "error", "says"), ACTS)
def test_loading_that_fails_is_one_error(number, act, error, says):
    script = ({}, {})
    script[number][LOADING, 0] = act
    driver = Driver(script)
    with pytest.raises(error, match=says):
        driver.engine()
    assert all(rank.released for rank in driver.started[0])
    assert ask(driver.engine()) == WORKS


@pytest.mark.parametrize(("number", "act", "error", "says"), ACTS)
def test_scoring_that_fails_ends_requests_under_way_too(number, act, error, says):
    """What the pages held is gone with the ranks: no other request may go on."""
    script = ({}, {})
    script[number][SCORE, 0] = act
    driver = Driver(script)
    engine = driver.engine()
    other = engine.add(Sequence([*PROMPT], SamplingParams(), 50))
    engine.step()
    with pytest.raises(error, match=says):
        engine.score([[1]], [None])
    assert other.finished == "error"
    assert ask(engine) == WORKS


def test_a_rank_that_died_is_named_not_the_one_that_misses_it():
    lost = (FAILED, "RuntimeError: Connection closed by peer", "trace")
    engine = Driver(({(RUN, 0): lost}, {(RUN, 0): DIES})).engine()
    with pytest.raises(RankError, match=r"^rank 1 was ended by signal 9 while generating; the next call starts new"):
        ask(engine)


def test_an_error_that_all_ranks_meet_is_raised_as_it_is():
    refused = (REFUSED, InputError("the folder"))
    with pytest.raises(InputError, match=r"^the folder$"):
        Driver(({(LOADING, 0): refused}, {(LOADING, 0): refused})).engine()


def test_scores_are_not_taken_for_a_step_that_is_under_way():
    engine = Driver(ahead=1).engine()
    other = engine.add(Sequence([*PROMPT], SamplingParams(), 50))
    engine.step()
    assert engine.score([[1]], [None]) == []
    assert ask(engine) == WORKS
    assert other.drawn


def test_ranks_that_start_again_have_as_many_pages_and_nothing_in_them():
    driver = Driver(({}, {(RUN, 6): DIES}))
    engine = driver.engine()
    assert ask(engine) == WORKS
    with pytest.raises(RankError):
        ask(engine)
    ask(engine)
    assert engine.scheduler.counts.cached_tokens == 192  # of the second call: the third found nothing
    assert [rank.options.get("pages") for ranks in driver.started for rank in ranks] == [None, None, 9, 9]
    assert [rank.options["progress"] for rank in driver.started[0]] == [True, False]


def close(driver: Driver, engine: Engine) -> None:
    driver.executor.stop()
    engine.close(RankError("the ranks were closed while generating"))


def test_closed_while_another_thread_waits():
    driver = Driver(({(RUN, 1): SILENT}, {}))
    driver.executor._step_timeout = 60
    engine = driver.engine()
    requests = [engine.add(Sequence([*PROMPT], SamplingParams(), 50)) for _ in range(2)]

    def wait_for(request: Sequence) -> None:
        while not request.finished:
            with contextlib.suppress(RankError):
                engine.advance([request])

    threads = [threading.Thread(target=wait_for, args=[request]) for request in requests]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    began = time.monotonic()
    close(driver, engine)
    for thread in threads:
        thread.join(5)
    assert time.monotonic() - began < 2
    assert [str(request.error) for request in requests] == ["the ranks were closed while generating"] * 2
    assert all(rank.released for rank in driver.started[0])
    assert ask(engine) == WORKS


def test_closed_between_two_steps_ends_the_requests_and_empties_the_pages():
    driver = Driver()
    engine = driver.engine()
    request = engine.add(Sequence([*PROMPT], SamplingParams(), 50))
    engine.step()
    close(driver, engine)
    assert isinstance(request.error, RankError)
    assert ask(engine) == WORKS
    assert engine.scheduler.counts.cached_tokens == 0


def test_closed_while_loading():
    driver = Driver(({}, {(LOADING, 0): SILENT}))
    driver.executor._load_timeout = 60
    threading.Timer(0.1, driver.executor.stop).start()
    with pytest.raises(RankError, match=r"^the ranks were closed while loading$"):
        driver.engine()
    assert all(rank.released for rank in driver.started[0])


def interrupt() -> None:
    threading.Timer(0.1, lambda: signal.raise_signal(signal.SIGINT)).start()


def test_ctrl_c_while_a_step_is_awaited_leaves_the_ranks_where_it_ends_soon(monkeypatch):
    monkeypatch.setattr(module, "GRACE", 10.0)
    driver = Driver(({(RUN, 1): SILENT}, {}))
    engine = driver.engine()
    driver.executor._step_timeout = 60

    def interrupt_then_answer() -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.5)  # the main thread must have seen the signal: in the middle of the message it ends the ranks
        driver.started[0][0]._mine.send((DONE, StepResult([], {})))

    threading.Timer(0.1, interrupt_then_answer).start()
    with pytest.raises(KeyboardInterrupt):
        ask(engine)
    assert ask(engine) == WORKS
    assert len(driver.started) == 1


def test_ctrl_c_while_a_step_hangs_ends_the_ranks():
    driver = Driver(({(RUN, 1): SILENT}, {}))
    engine = driver.engine()
    driver.executor._step_timeout = 60
    other = engine.add(Sequence([*PROMPT], SamplingParams(), 50))
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        ask(engine)
    assert isinstance(other.error, RankError)  # another thread's request: its call was not interrupted
    assert all(rank.released for rank in driver.started[0])
    assert ask(engine) == WORKS
