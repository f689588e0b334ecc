"""Ranks of a launcher that meet, and the one line where they cannot."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time

import pytest
from helpers.distributed import run_ranks

from accessory.errors import RankError
from accessory.launch import meeting
from accessory.launch.environment import Launch
from accessory.launch.meeting import meet

MEETS = """
from accessory.commands import outcome
from accessory.launch import meeting
from accessory.launch.process_group import join_launched
outcome.FIRST_SPEAKS = 0
meeting.SPEAKS, meeting.AGAIN, meeting.GIVES_UP = 0.5, 0.5, 2.0
def run():
    import torch, torch.distributed as dist
    join_launched()
    sum_1 = torch.ones(1)
    dist.all_reduce(sum_1)
    print(int(sum_1), flush=True)
    dist.destroy_process_group()
raise SystemExit(outcome.outcome(run))
"""


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def variables(rank, size, port, address="127.0.0.1"):
    named = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": address, "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    return {name: str(value) for name, value in named.items()}


def start(rank, size, port, address="127.0.0.1"):
    return subprocess.Popen(
        [sys.executable, "-c", MEETS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **variables(rank, size, port, address)},
    )  # fmt: skip


def launch(port, rank=0, address="127.0.0.1"):
    return Launch(rank=rank, size=2, local_rank=rank, address=address, port=port)


def meets(rank, world, port, last, out):
    """The status of MEETS in a rank; `last` comes later than the other one. What it prints goes to a file."""
    with open(out / str(rank), "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
    os.environ.update(variables(rank, world, port))
    time.sleep(0.2 * (rank == last))
    try:
        exec(MEETS, {})
    except SystemExit as end:
        sys.stdout.flush()
        return end.code


@pytest.mark.parametrize("last", [0, 1])
def test_ranks_meet_in_any_order_and_say_nothing_else(port, tmp_path, last):
    assert run_ranks(meets, 2, port, last, tmp_path, grouped=False) == [0, 0]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["2\n", ""]


@pytest.mark.parametrize(("rank", "missing"), [(0, "rank 1"), (1, "rank 0")])
def test_a_rank_that_waits_says_for_whom_and_gives_up(rank, missing, port, monkeypatch, capsys):
    for name, seconds in {"POLL": 0.05, "SPEAKS": 0.3, "AGAIN": 0.3, "GIVES_UP": 1.2}.items():
        monkeypatch.setattr(meeting, name, seconds)
    gone = rf"^rank {rank} of 2 waited \d+ s for {missing} at 127\.0\.0\.1:{port}; is [^\n]+$"
    with pytest.raises(RankError, match=gone):
        meet(launch(port, rank))
    waits = capsys.readouterr().err.splitlines()
    waiting = rf"rank {rank} of 2 waits for {missing} at 127\.0\.0\.1:{port} since \d+ s; gives up in \d+ s"
    assert 2 <= len(waits) <= 4, waits
    assert all(re.fullmatch(waiting, line) for line in waits), waits


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_nobody_joins_ends_with_one_line(rank, port):
    _, said = start(rank, 2, port).communicate(timeout=60)
    last = said.splitlines()[-1]
    assert re.search(
        rf"error: (rank 1: )?rank {rank} of 2 waited \d+ s for rank {1 - rank} at 127.0.0.1:{port}; is ", last
    )


@pytest.mark.parametrize(("given", "named"), [("no-such-host.invalid", "MASTER_ADDR"), (None, "SLURM_STEP_NODELIST")])
def test_a_name_without_an_address_is_named_at_once(given, named, port, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    if given is not None:
        monkeypatch.setenv("MASTER_ADDR", given)
    began = time.monotonic()
    with pytest.raises(RankError, match=rf"^rank 1 of 2: {named}: got 'no-such-host.invalid', which names no machine"):
        meet(launch(port, 1, "no-such-host.invalid"))
    assert time.monotonic() - began < 30


def test_a_port_of_another_program_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RankError, match=f"^MASTER_PORT: {port} on 127.0.0.1 is in use; [^\n]+$"):
            meet(launch(port))


def test_a_first_rank_that_dies_while_others_wait_is_named(port, monkeypatch):
    """Three ranks, the last of which never comes."""
    first = start(0, 3, port)
    try:
        monkeypatch.setattr(meeting, "POLL", 0.5)
        monkeypatch.setattr(meeting, "SPEAKS", 0.0)
        monkeypatch.setattr("builtins.print", lambda *_, **__: first.kill())
        with pytest.raises(RankError, match=r"rank 1 of 3: rank 0 at 127\.0\.0\.1:\d+ is gone"):
            meet(Launch(rank=1, size=3, local_rank=1, address="127.0.0.1", port=_served(port)))
    finally:
        first.kill()
        first.communicate()


def _served(port):
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return port
        except OSError:
            time.sleep(0.1)
