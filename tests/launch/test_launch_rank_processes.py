"""A driver and its ranks. Here the ranks are small programs that load no model."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from accessory.errors import RankError
from accessory.launch.rank_processes import end_processes, start_processes, who_ended

ECHO = """
from accessory.launch.ending import leave
from accessory.launch.rank_processes import call_back
place, connection = call_back()
try:
    while True:
        connection.send((place.rank, place.size, place.host, place.port, connection.recv()))
except EOFError:
    leave(0)
"""
FAILS = """
import os, sys
from accessory.launch.rank_processes import Place
place = Place(**__import__("json").loads(sys.stdin.readline()))
sys.exit("RuntimeError: no room left" if place.rank else sys.stdin.read())
"""
SILENT = "import time; time.sleep(60)"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts two ranks of a program, and ends them after the test."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ranks = []

    def start(program, patience=60.0):
        (tmp_path / "a_rank.py").write_text(program)
        start_processes("a_rank", [None, None], "127.0.0.1", 4321, patience, ranks)
        return ranks

    start.ranks = ranks
    yield start
    end_processes(ranks)


def processes(ranks):
    return [psutil.Process(rank._process.pid) for rank in ranks]


def test_ranks_know_their_place_and_answer(start):
    ranks = start(ECHO)
    for rank in ranks:
        rank.connection.send("hello")
    assert [rank.connection.recv() for rank in ranks] == [(r, 2, "127.0.0.1", 4321, "hello") for r in (0, 1)]
    assert who_ended(ranks, 0.1) == ""
    alive = processes(ranks)
    end_processes(ranks)
    assert not psutil.wait_procs(alive, timeout=5)[1]


def test_who_ended_says_which_and_by_what(start):
    ranks = start(ECHO)
    os.kill(ranks[1]._process.pid, signal.SIGKILL)
    started = time.monotonic()
    assert who_ended(ranks, 30) == "rank 1 was ended by signal 9"
    assert time.monotonic() - started < 5


def test_a_rank_that_takes_no_message_does_not_hold_up_the_driver(start):
    """It is stopped, and the message is larger than what the system keeps for it."""
    ranks = start(ECHO)
    ranks[1].limit(0.2)
    os.kill(ranks[1]._process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(BlockingIOError):
        ranks[1].connection.send_bytes(bytes(10**7))
    assert time.monotonic() - started < 5


def test_ranks_end_when_the_driver_lets_go(start):
    ranks = start(ECHO)
    alive = processes(ranks)
    for rank in ranks:
        rank._process.stdin.close()
    assert not psutil.wait_procs(alive, timeout=5)[1]


def test_a_rank_that_ends_before_it_calls_back_says_why(start):
    with pytest.raises(RankError) as error:
        start(FAILS)
    assert str(error.value) == "rank 1 ended (1), saying 'RuntimeError: no room left', before it could load"
    assert len(start.ranks) == 2  # there for the caller to end


def test_ranks_that_never_call_back_are_not_awaited(start):
    with pytest.raises(RankError, match="the ranks did not start within 1 s"):
        start(SILENT, patience=1.0)
