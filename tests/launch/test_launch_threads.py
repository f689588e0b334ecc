"""How many threads compute, by what the system's files say of cores, affinity and quotas."""

from __future__ import annotations

import pytest
import torch

from accessory.launch import threads
from accessory.launch.threads import cores, use_cores

HYPERTHREADS = {f"cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}\n" for n in range(8)}
QUOTA = {"self/cgroup": "0::/job/step\n", "cgroup/job/cpu.max": "200000 100000\n", "cgroup/job/step/cpu.max": "max 1\n"}
OLD_QUOTA = {
    "self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/b\n",
    "cgroup/cpu/job/cpu.cfs_quota_us": "350000\n",
    "cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
    "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "cgroup/cpu/cpu.cfs_period_us": "100000\n",
}
SMALL = {"self/cgroup": "0::/\n", "cgroup/cpu.max": "50000 100000\n"}


@pytest.fixture
def found(tmp_path, monkeypatch):
    """The cores that a system with these files has for a process on these processors."""

    def find(files, allowed=range(8)):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(threads, "_allowed", lambda: set(allowed))
        return cores(tmp_path / "cpu", tmp_path / "self/cgroup", tmp_path / "cgroup")

    return find


@pytest.mark.parametrize(
    ("files", "allowed", "expected"),
    [
        ({}, range(8), 8),
        (HYPERTHREADS, range(8), 4),
        (HYPERTHREADS, [0, 4, 5], 2),  # two hyper-threads of a core, one of another
        (QUOTA, range(8), 2),
        (OLD_QUOTA, range(8), 3),
        (HYPERTHREADS | QUOTA, [1], 1),
        (SMALL, range(8), 1),
        ({**QUOTA, "cgroup/job/cpu.max": "max 100000\n"}, range(8), 8),
        ({"self/cgroup": "0::/../outside\n"}, range(8), 8),
    ],
)
def test_cores_are_those_of_affinity_and_quota_without_hyperthreads(found, files, allowed, expected):
    assert found(files, allowed) == expected


def test_this_machine_has_some():
    assert 1 <= cores() <= len(threads._allowed())


@pytest.mark.parametrize(
    ("variables", "before", "after"),
    [
        ({}, 64, 2),  # torch's default: every hyper-thread
        ({}, 32, 2),  # or every core
        ({}, 5, 5),  # somebody's choice
        ({"OMP_NUM_THREADS": "64"}, 64, 64),
        ({"MKL_NUM_THREADS": "32"}, 32, 32),
    ],
)
def test_a_number_that_somebody_chose_stays(monkeypatch, variables, before, after):
    now = [before]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.append(n) or now.pop(0))
    monkeypatch.setattr(threads, "_allowed", lambda: set(range(64)))
    monkeypatch.setattr(threads, "_physical", lambda allowed, system: 32)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    use_cores()
    assert now == [after]
