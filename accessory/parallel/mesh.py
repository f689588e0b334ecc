"""The ranks that hold one model together, and how a process learns that it is one of them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from accessory.errors import ConfigError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Ranks:
    """A process group and this process's place in it."""

    group: Any  # torch.distributed.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any) -> Ranks:
        if not dist.is_initialized():
            raise ConfigError("mp_group: call torch.distributed.init_process_group before making groups and models")
        if not isinstance(group, dist.ProcessGroup):
            raise ConfigError(f"mp_group: got a {type(group).__name__}, but it must be a torch.distributed group")
        rank = dist.get_rank(group)
        if rank < 0:
            raise ConfigError("mp_group: this process does not belong to it; pass a group that holds this rank")
        return cls(group, rank, dist.get_world_size(group))

    @property
    def first(self) -> int:
        """The global rank of the group's first process, the one that decides."""
        return dist.get_global_rank(self.group, 0)


@dataclass(frozen=True)
class Launch:
    """What a launcher says of this process."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def launch_of(environment: dict[str, str]) -> Launch | None:
    """Read torchrun's variables, else Slurm's (one task a rank under srun); None for a process started alone."""
    e = environment
    if "WORLD_SIZE" in e and "RANK" in e:
        launch = Launch(
            rank=_int(e, "RANK"),
            size=_int(e, "WORLD_SIZE"),
            local_rank=_int(e, "LOCAL_RANK", _int(e, "RANK")),
            address=e.get("MASTER_ADDR", "127.0.0.1"),
            port=_int(e, "MASTER_PORT", DEFAULT_PORT),
        )
    elif "SLURM_PROCID" in e and "SLURM_STEP_ID" in e:
        launch = Launch(
            rank=_int(e, "SLURM_PROCID"),
            size=_int(e, "SLURM_STEP_NUM_TASKS", _int(e, "SLURM_NTASKS", 1)),
            local_rank=_int(e, "SLURM_LOCALID", 0),
            address=e.get("MASTER_ADDR") or first_host(e.get("SLURM_STEP_NODELIST", e.get("SLURM_NODELIST", ""))),
            # Jobs that share a node must not meet on one port, and all ranks of a job must agree on theirs.
            port=_int(e, "MASTER_PORT", DEFAULT_PORT + _int(e, "SLURM_JOB_ID", 0) % 1000),
        )
    else:
        return None
    if not 0 <= launch.rank < launch.size:
        raise ConfigError(f"RANK: got {launch.rank}, but it must lie in 0 … {launch.size - 1} (WORLD_SIZE)")
    return launch if launch.size > 1 else None


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list such as `gpu[03-05,9],cpu1`: `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    return (match[1] + (match[2] or "")) if match else "127.0.0.1"


def from_environment(timeout: timedelta = timedelta(minutes=10)) -> Ranks | None:
    """Join the other ranks if a launcher started several (NCCL where there are GPUs, else gloo); None if it did not."""
    if dist.is_initialized():
        return Ranks.of(dist.group.WORLD) if dist.get_world_size() > 1 else None
    launch = launch_of(dict(os.environ))
    if launch is None:
        return None
    cuda = torch.cuda.is_available()
    if cuda:
        if launch.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_RANK: got {launch.local_rank}, but this machine shows {torch.cuda.device_count()} GPUs; "
                "start one rank a GPU"
            )
        torch.cuda.set_device(launch.local_rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // min(launch.size, os.cpu_count() or 1)))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://{launch.address}:{launch.port}" if "TORCHELASTIC_RUN_ID" not in os.environ else "env://",
        rank=launch.rank,
        world_size=launch.size,
        timeout=timeout,
    )
    return Ranks.of(dist.group.WORLD)


def _int(environment: dict[str, str], name: str, otherwise: int | None = None) -> int:
    text = environment.get(name)
    if text is None and otherwise is not None:
        return otherwise
    try:
        return int(str(text))
    except ValueError as error:
        raise ConfigError(f"{name}: got {text!r}, but it must be a whole number") from error
