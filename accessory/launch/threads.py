"""How many threads compute on this machine's CPU."""

from __future__ import annotations

import os
from pathlib import Path

from accessory.launch.cgroups import MOUNTED, PROC, cgroup_folders, lines_of

SYSTEM = Path("/sys/devices/system/cpu")
# What sets the number of torch's threads before it starts.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def use_cores() -> None:
    """Let torch compute with a thread for each core of `cores`, unless somebody has chosen another number.

    Torch's own default knows no quota, and on many machines no hyper-threads: two of them share a core's arithmetic.
    """
    import torch

    allowed = _allowed()
    defaults = {len(allowed), _physical(allowed, SYSTEM), os.cpu_count()}
    if not any(map(os.environ.get, VARIABLES)) and torch.get_num_threads() in defaults:
        torch.set_num_threads(cores())


def cores(system: Path = SYSTEM, proc: Path = PROC, mounted: Path = MOUNTED) -> int:
    """The cores that this process may use: those of its affinity, and no more than the quota of its cgroups."""
    quotas = [quota for folder in cgroup_folders("cpu", proc, mounted) if (quota := _quota(folder)) is not None]
    return max(1, int(min([_physical(_allowed(), system), *quotas])))


def _allowed() -> set[int]:
    """The processors on which this process may run, hyper-threads counted."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _physical(allowed: set[int], system: Path) -> int:
    """How many cores these processors are. A processor of which the system does not say so is one."""
    siblings = (lines_of(system / f"cpu{number}/topology/thread_siblings_list") for number in allowed)
    return len({tuple(lines) or number for number, lines in zip(allowed, siblings, strict=True)})


def _quota(folder: Path) -> float | None:
    """Processors' worth of time that a cgroup gets; None without a limit."""
    numbers = [word for line in lines_of(folder / "cpu.max")[:1] for word in line.split()]
    numbers = numbers or [n for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us") for n in lines_of(folder / name)[:1]]
    if len(numbers) == 2 and all(number.isdigit() for number in numbers):  # "max" or -1: no limit
        return int(numbers[0]) / int(numbers[1])
    return None
