"""Ranks as processes of their own, which share the first one's address through a file."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

RANK = """
import os, pickle, signal, sys, time
from accessory.launch import peers
from accessory.launch.peers import Peers
peers.PATIENCE = 0.5
rank, size, path, ends = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]

def share(value):
    if rank == 0:
        with open(path + ".part", "wb") as file:
            pickle.dump(value, file)
        os.rename(path + ".part", path)
        return value
    while not os.path.exists(path):
        time.sleep(0.01)
    with open(path, "rb") as file:
        return pickle.load(file)

watch = Peers(rank, size, share)
until = time.monotonic() + 20
while len(watch._sockets) < (size - 1 if rank == 0 else 1) and time.monotonic() < until:
    time.sleep(0.01)
print("connected", flush=True)
if rank == size - 1:
    sys.stdin.readline()
    if ends.startswith(("killed", "run")):
        os.kill(os.getpid(), signal.SIGKILL)
    if ends == "error":
        raise ValueError("this rank fails")
    sys.exit(0)
if ends == "between":
    time.sleep(1.5)
    sys.exit(0)
with watch.run() if ends.startswith("run") else watch.step():
    if ends == "run told":  # as gloo tells it
        time.sleep(0.3)
        raise RuntimeError("Connection closed by peer")
    time.sleep(1.5 if ends == "well" else 60)
"""


def ranks(tmp_path, ends, size, launcher=None):
    env = os.environ | ({} if launcher is None else {"TORCHELASTIC_RUN_ID": launcher})
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(size), str(tmp_path / "address"), ends],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(size)
    ]
    try:
        assert [process.stdout.readline() for process in started] == ["connected\n"] * size
        started[-1].stdin.write("\n")
        started[-1].stdin.flush()
        begin = time.monotonic()
        ended = [process.communicate(timeout=30) for process in started]
        return [process.returncode for process in started], [err for _, err in ended], time.monotonic() - begin
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("ends", ["killed", pytest.param("error", marks=pytest.mark.slow)])
def test_ranks_that_wait_for_one_that_is_gone_end(tmp_path, ends):
    status, errors, seconds = ranks(tmp_path, ends, 3)
    assert status[:2] == [1, 1]
    for rank in range(2):
        assert errors[rank] == f"accessory: error: rank {rank}: another rank is gone in the middle of a step\n"
    assert seconds < 10


@pytest.mark.parametrize("ends", ["run", "run told"])
def test_a_run_under_torchrun_ends_without_a_word(tmp_path, ends):
    """torchrun says which rank was killed. The others wait in a collective, or it fails."""
    status, errors, seconds = ranks(tmp_path, ends, 2, launcher="one")
    assert (status, errors[0]) == ([1, -9], "")
    assert seconds < 10


def test_a_run_that_a_collective_tells_of_another_ranks_end_is_a_rank_error(tmp_path):
    status, errors, _ = ranks(tmp_path, "run told", 2)
    assert status == [1, -9]
    assert errors[0].endswith("RankError: another rank is gone in the middle of a step\n")


@pytest.mark.parametrize("ends", ["well", "between"])
def test_a_rank_that_ends_as_it_should_or_between_steps_ends_nobody(tmp_path, ends):
    """`well`: it says goodbye while the other is still in a step. `between`: the other is in none."""
    status, errors, _ = ranks(tmp_path, ends, 2)
    assert status == [0, 0]
    assert errors == ["", ""]
