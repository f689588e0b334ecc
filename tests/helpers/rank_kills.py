"""The ranks of a `MultiGpuWrapper`: found among the processes, killed in the middle of a step, and gone."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

import psutil
import pytest

from accessory.launch.rank_processes import RankProcess
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper

SOON = 10.0  # seconds within which every failure must be reported and cleaned up


def rank_processes() -> list[psutil.Process]:
    """All processes of ranks that this process has started."""
    return [p for p in psutil.Process().children(recursive=True) if "rank_worker" in " ".join(p.cmdline())]


def gone(processes: Sequence[psutil.Process], patience: float = SOON) -> bool:
    return not psutil.wait_procs(processes, timeout=patience)[1]


def rank_of(wrapper: MultiGpuWrapper, number: int) -> RankProcess:
    return wrapper._ranks._ranks[number]


def kill_in_step(wrapper: MultiGpuWrapper, monkeypatch: pytest.MonkeyPatch, step: int) -> list[Any]:
    """Kill rank 1 in this step from now on, the first is 1. Returns the list that the steps' messages will be in."""
    ask, steps = wrapper._ranks._ask, []

    def kill(*message: Any) -> Any:
        steps.append(message)
        pid = rank_of(wrapper, 1)._process.pid
        if len(steps) == step:
            os.kill(pid, signal.SIGSTOP)  # otherwise a short step could end before the rank does
        answer = ask(*message)
        if len(steps) == step:
            os.kill(pid, signal.SIGKILL)
        return answer

    monkeypatch.setattr(wrapper._ranks, "_ask", kill)
    return steps
