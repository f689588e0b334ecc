"""How ranks end: together with the process that started them, in time, and after their output is written."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from accessory.launch import ending


def test_a_rank_ends_when_its_launcher_is_gone(monkeypatch, capsys):
    left = []

    def leave(status):
        left.append(status)
        raise SystemExit

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(ending.os, "_exit", leave)
    parents = iter([7, 7, 7, 1])
    monkeypatch.setattr(ending.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(ending, "time", SimpleNamespace(sleep=lambda seconds: None))
    with pytest.raises(SystemExit):
        ending._end_when(ending.watch_torchrun(), 0)
    assert left == [1]
    assert capsys.readouterr().err == "accessory: error: torchrun is gone\n"


def test_only_torchrun_is_watched(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    parents = iter([7, 1])
    monkeypatch.setattr(ending.os, "getppid", lambda: next(parents))
    assert not ending.watch_torchrun()()


def ends(program):
    """Run a program whose standard input stays open. Returns its output, its exit status and the seconds it took."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", f"from accessory.launch.ending import *\nimport sys, time\n{program}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = process.stdout.read()
    return said, process.wait(60), time.monotonic() - started


def test_what_hangs_is_ended_in_time():
    said, status, seconds = ends("print('here', flush=True); end_within(0.5); time.sleep(60)")
    assert (said, status) == ("here\n", 1)
    assert seconds < 30


def test_leaving_says_what_was_said_and_runs_nothing_else():
    program = "import atexit; atexit.register(print, 'never'); print('said'); leave(3)"
    assert ends(program)[:2] == ("said\n", 3)


def test_a_rank_ends_with_its_standard_input():
    process = subprocess.Popen(
        [sys.executable, "-c", "from accessory.launch.ending import *\nimport time; end_with_driver(); time.sleep(60)"],
        stdin=subprocess.PIPE,
    )
    time.sleep(0.5)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(30) == 1
