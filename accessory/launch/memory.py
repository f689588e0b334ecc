"""How much memory a rank may still take: of its GPU, or of this machine's, which all ranks here share.

torch is imported in functions, because the planner, which imports this module, answers without it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory.errors import ConfigError
from accessory.launch.cgroups import MOUNTED, PROC, cgroup_folders, lines_of

if TYPE_CHECKING:
    import torch

# What cgroups (version 2, then 1) call their limit, their use, and the pages of files, which the system takes back.
_CGROUPS = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


@dataclass(frozen=True)
class Room:
    """The bytes that a rank may take, and where they are: the name of a GPU, or `HOST`."""

    nbytes: int
    where: str

    @property
    def on_gpu(self) -> bool:
        return self.where != HOST

    def __str__(self) -> str:
        return f"{self.where} has {gigabytes(self.nbytes)}"

    def shared_by(self, ranks: int) -> Room:
        """The part of each of this machine's ranks: they share its memory, while each GPU is a rank's own."""
        return self if self.on_gpu else Room(self.nbytes // ranks, self.where)


HOST = "this machine"


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.3g} GB" if nbytes < 1e12 else f"{nbytes / 1e9:,.0f} GB"


def room_for(device: torch.device | str, group: Any = None, *, with_own: bool = False) -> Room | None:
    """The memory that this process may still take on `device`; None where the system does not say.

    group: a torch process group; all its ranks must call this at once and get the same answer, that of the rank with
    the least. Ranks that compute on one machine's CPU get equal parts of its memory. with_own: count what this process
    holds already. ConfigError, one line, where the GPU cannot be used.
    """
    import torch

    device = torch.device(device)
    own: Room | ConfigError | None
    try:
        own = _gpu_room(device, with_own) if device.type == "cuda" else _host_room(with_own)
    except ConfigError as error:
        if group is None:
            raise
        own = error
    if group is None:
        assert not isinstance(own, ConfigError)
        return own
    import torch.distributed as dist

    # A machine's ranks ask at about the same time and get about the same answer, before any of them has taken memory.
    rooms: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(rooms, (socket.gethostname(), own), group=group)
    hosts = [host for host, _ in rooms]
    shares: list[Room] = []
    for rank, (host, room) in enumerate(rooms):
        if isinstance(room, ConfigError):
            raise ConfigError(f"rank {rank}: {room}")
        if room is not None:
            shares.append(room.shared_by(hosts.count(host)))
    return min(shares, key=lambda room: room.nbytes) if len(shares) == len(rooms) else None


def _gpu_room(device: torch.device, with_own: bool) -> Room:
    import torch

    try:
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)  # torch gives out again what it holds and nothing uses
        used = 0 if with_own else torch.cuda.memory_allocated(device)
        return Room(free + held - used, torch.cuda.get_device_name(device))
    except (RuntimeError, AssertionError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0].removeprefix("CUDA error: ")
        raise ConfigError(
            f"device: {device} cannot be used: {said}; `nvidia-smi` shows whether another process fills it or holds it "
            "alone (exclusive mode); choose another one with CUDA_VISIBLE_DEVICES"
        ) from error


def check_gpu(device: torch.device | str) -> None:
    """ConfigError, one line, where the GPU cannot be used: it is full, or another process holds it alone."""
    import torch

    _gpu_room(torch.device(device), with_own=True)


def _host_room(with_own: bool) -> Room | None:
    system = _fields(Path("/proc/meminfo"))
    if "MemAvailable" not in system:
        return None
    swap = system.get("SwapFree", 0)
    free = min([system["MemAvailable"], *_cgroup_rooms()]) + swap
    own = _fields(Path("/proc/self/status")).get("RssAnon", 0) if with_own else 0
    return Room(max(0, free) + own, HOST)


def _cgroup_rooms(proc: Path = PROC, mounted: Path = MOUNTED) -> Iterator[int]:
    """What each cgroup that this process is in, and each of those above it, leaves of its limit."""
    for folder in cgroup_folders("memory", proc, mounted):
        yield from _left(folder)


def _left(folder: Path) -> Iterator[int]:
    for limit, use, reclaimed in _CGROUPS:
        numbers = [line for name in (limit, use) for line in lines_of(folder / name)[:1]]
        if len(numbers) == 2 and all(number.isdigit() for number in numbers):  # "max": no limit
            pages = dict(line.split(None, 1) for line in lines_of(folder / "memory.stat"))
            yield int(numbers[0]) - int(numbers[1]) + sum(int(pages.get(name, 0)) for name in reclaimed)


def _fields(path: Path) -> Mapping[str, int]:
    """Bytes by name, from lines such as `MemAvailable: 1024 kB`."""
    words = (line.split() for line in lines_of(path))
    return {w[0].rstrip(":"): int(w[1]) * 1024 for w in words if len(w) == 3 and w[2] == "kB"}
