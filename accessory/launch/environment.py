"""Reads the environment variables that a launcher (torchrun, Slurm's srun) sets for this process.

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from accessory.errors import ConfigError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Launch:
    """This process as one of several ranks that a launcher started, and the address where they meet."""

    rank: int
    size: int
    local_rank: int  # among the ranks of this machine
    address: str
    port: int


def launch_of(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Read torchrun's variables, else Slurm's (srun starts one task per rank); None for a process started alone.

    ConfigError names a variable with an invalid value.
    """
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
            # Jobs on the same node need different ports, and all ranks of a job need the same port.
            port=_int(e, "MASTER_PORT", DEFAULT_PORT + _int(e, "SLURM_JOB_ID", 0) % 1000),
        )
    else:
        return None
    if not 0 <= launch.rank < launch.size:
        raise ConfigError(f"RANK: got {launch.rank}, but it must lie in 0 … {launch.size - 1} (WORLD_SIZE)")
    return launch if launch.size > 1 else None


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's rank; 0 for a process started alone.

    It is also 0 where `launch_of` would raise, so that such a process prints the error.
    """
    try:
        launch = launch_of(environment)
    except ConfigError:
        return 0
    return launch.rank if launch is not None else 0


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list such as `gpu[03-05,9],cpu1`: `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    return (match[1] + (match[2] or "")) if match else "127.0.0.1"


def set_meeting_point(address: str | None, port: int | None) -> None:
    """Set the address and the port where the ranks meet, unless the launcher has set them."""
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        if value is not None:
            os.environ.setdefault(name, str(value))


def _int(environment: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    text = environment.get(name)
    if text is None and otherwise is not None:
        return otherwise
    try:
        return int(str(text))
    except ValueError as error:
        raise ConfigError(f"{name}: got {text!r}, but it must be a whole number") from error
