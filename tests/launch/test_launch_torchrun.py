"""Ranks that torchrun starts: their environment, their arguments, and how a failure is reported."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from accessory.launch.torchrun import _ended_by_signals

# Each rank writes once, so that the lines of two ranks do not mix.
RANK = """
import os, sys
os.write(1, f"{{os.environ['RANK']}} {{os.environ['WORLD_SIZE']}} {{' '.join(sys.argv[1:])}}\\n".encode())
sys.exit({})
"""


def ranks(n, code, *words):
    """Call `run_under_torchrun` in a new process, because it changes the environment."""
    program = "import sys; from accessory.launch.torchrun import run_under_torchrun as r; sys.exit(r({}, {!r}))"
    return subprocess.run(
        [sys.executable, "-c", program.format(n, ["-c", code, *words])],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def test_started_ranks_know_who_they_are_and_get_every_word():
    done = ranks(2, RANK.format(0), "a=[1, 2]", "--debug")
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, [f"{r} 2 a=[1, 2] --debug" for r in (0, 1)])
    assert done.stderr == ""


def test_a_failed_rank_is_a_failure_and_the_launcher_adds_nothing():
    done = ranks(2, RANK.format("'it says so' if os.environ['RANK'] == '1' else 0"))
    assert (done.returncode, done.stderr) == (1, "it says so\n")


def test_a_rank_that_a_signal_ends_is_named():
    done = ranks(2, RANK.format("os.environ['RANK'] == '1' and os.kill(os.getpid(), 9)"))
    assert done.returncode == 1
    assert done.stderr.endswith("accessory.errors.RankError: rank 1 was ended by signal 9; all ranks are ended\n")


@pytest.mark.parametrize(
    ("exit_codes", "named"),
    [
        ({1: 1}, {}),
        ({0: -signal.SIGTERM, 1: 1}, {}),
        ({0: -signal.SIGTERM, 1: -signal.SIGKILL}, {1: signal.SIGKILL}),
        ({0: 1, 1: -signal.SIGKILL}, {1: signal.SIGKILL}),
        ({0: -signal.SIGTERM}, {0: signal.SIGTERM}),
    ],
)
def test_ranks_that_the_launcher_ended_are_not_named_where_another_failed(exit_codes, named):
    assert _ended_by_signals(exit_codes) == named
