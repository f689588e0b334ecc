"""How much memory a rank may take: what the system and cgroups say, and GPUs that cannot be used."""

from __future__ import annotations

import pytest
import torch

from accessory.errors import ConfigError, RankError
from accessory.launch import memory
from accessory.launch.memory import HOST, Room, room_for

MEMINFO = "MemTotal: 64 kB\nMemAvailable: 1000 kB\nSwapFree: 10 kB\nHugePages_Total: 0\n"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system's files, made of (name, text)."""

    def make(**files):
        for name, text in {"meminfo": MEMINFO, "self/status": "RssAnon: 7 kB\n", **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    def path(name):
        return tmp_path / name.removeprefix("/proc/").removeprefix("/sys/fs/")

    monkeypatch.setattr(memory, "Path", path)
    cgroups = memory._cgroup_rooms
    monkeypatch.setattr(memory, "_cgroup_rooms", lambda: cgroups(tmp_path / "self/cgroup", tmp_path / "cgroup"))
    return make


def test_this_machine_says_what_it_has():
    room = room_for("cpu")
    assert room is not None
    assert 0 < room.nbytes < room_for("cpu", with_own=True).nbytes + 2**30
    assert (room.where, room.on_gpu) == (HOST, False)


def test_available_memory_and_swap_count(system):
    system()
    assert room_for("cpu") == Room(1010 * 1024, HOST)
    assert room_for("cpu", with_own=True) == Room(1017 * 1024, HOST)


@pytest.mark.parametrize(
    "files",
    [
        {
            "self/cgroup": "0::/job/step\n",
            "cgroup/job/memory.max": "600000\n",
            "cgroup/job/memory.current": "500000\n",
            "cgroup/job/memory.stat": "anon 1\ninactive_file 20000\nactive_file 3000\n",
            "cgroup/job/step/memory.max": "max\n",
            "cgroup/job/step/memory.current": "1\n",
        },
        {
            "self/cgroup": "5:cpu:/a\n4:memory:/job\n",
            "cgroup/memory/job/memory.limit_in_bytes": "600000\n",
            "cgroup/memory/job/memory.usage_in_bytes": "500000\n",
            "cgroup/memory/job/memory.stat": "total_inactive_file 20000\ntotal_active_file 3000\n",
            "cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "cgroup/memory/memory.usage_in_bytes": "900000\n",
        },
        {  # a container that sees its own group at the root
            "self/cgroup": "4:memory:/docker/abc\n",
            "cgroup/memory/memory.limit_in_bytes": "600000\n",
            "cgroup/memory/memory.usage_in_bytes": "477000\n",
        },
    ],
    ids=["version 2", "version 1", "container"],
)
def test_the_smallest_limit_of_the_cgroups_counts(system, files):
    system(**files)
    assert room_for("cpu") == Room(123_000 + 10 * 1024, HOST)


def test_a_system_that_does_not_say_leaves_the_room_unknown(system):
    system(meminfo="")
    assert room_for("cpu") is None


def test_ranks_of_a_machine_share_its_memory_and_no_gpu():
    assert Room(100, HOST).shared_by(4) == Room(25, HOST)
    assert Room(100, "H100").shared_by(4) == Room(100, "H100")


@pytest.fixture
def gpu(monkeypatch):
    values = {"mem_get_info": (50, 80), "memory_reserved": 20, "memory_allocated": 5, "get_device_name": "H100"}
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)


def test_a_gpu_gives_what_is_free_and_what_torch_holds_unused(gpu):
    assert room_for("cuda") == Room(65, "H100")
    assert room_for("cuda", with_own=True) == Room(70, "H100")


@pytest.mark.parametrize(
    "words",
    ["CUDA error: CUDA-capable device(s) is/are busy or unavailable", "CUDA error: out of memory\nCompile with …"],
)
def test_a_gpu_in_exclusive_mode_or_full_is_one_line(gpu, monkeypatch, words):
    def fails(device):
        raise RuntimeError(words)

    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    with pytest.raises(ConfigError) as error:
        room_for("cuda:1")
    said = str(error.value)
    assert said.startswith(f"device: cuda:1 cannot be used: {words.splitlines()[0].removeprefix('CUDA error: ')}; ")
    assert "nvidia-smi" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([("a", Room(90, HOST)), ("a", Room(80, HOST)), ("b", Room(50, HOST))], Room(40, HOST)),
        ([("a", Room(90, "H100")), ("a", Room(80, "H100"))], Room(80, "H100")),
        ([("a", Room(90, HOST)), ("b", None)], None),
        ([("a", Room(90, "H100")), ("a", ConfigError("device: busy"))], "rank 1: device: busy"),
    ],
)
def test_ranks_agree_on_the_least(monkeypatch, others, expected):
    def gather(into, own, group):
        into[:] = others

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: len(others))
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            room_for("cpu", group="a group")
    else:
        assert room_for("cpu", group="a group") == expected


def test_a_rank_whose_gpu_cannot_be_used_says_so_before_it_meets_the_others(gpu, monkeypatch):
    from accessory.launch.process_group import join_launched

    def fails(device):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    with pytest.raises(RankError, match=r"^rank 1 of 2: device: cuda:1 cannot be used: all CUDA-capable devices are"):
        join_launched()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="LOCAL_RANK: got 1, but this machine shows 1 GPUs"):
        join_launched()
