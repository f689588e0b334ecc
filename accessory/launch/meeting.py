"""Where a launcher's ranks meet: the store of the first one. A rank that waits for others says so, and not for ever."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from accessory.errors import RankError, listed
from accessory.launch.environment import Launch

# Seconds after which a waiting rank speaks, speaks again, and gives up.
SPEAKS, AGAIN, GIVES_UP = 10.0, 60.0, 600.0
POLL = 0.2


def meet(launch: Launch) -> dist.Store:
    """The store through which the ranks find each other; returns once all of them are there.

    RankError, one line, where the address has no meaning here, the port is taken, or a rank does not come in time.
    """
    who = f"rank {launch.rank} of {launch.size}"
    _resolve(who, launch)
    # torchrun keeps a store itself; its ranks are guests there.
    hosts = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not hosts:
        _wait(who, launch, lambda: [] if _answers(launch) else [0])
    store = dist.PrefixStore(f"accessory/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", _store(launch, hosts))
    try:
        store.set(str(launch.rank), "")
        _wait(who, launch, lambda: [rank for rank in range(launch.size) if not store.check([str(rank)])])
    except dist.DistError as error:
        raise RankError(f"{who}: rank 0 at {launch.address}:{launch.port} is gone") from error
    return store


def _resolve(who: str, launch: Launch) -> None:
    try:
        socket.getaddrinfo(launch.address, launch.port, type=socket.SOCK_STREAM)
    except OSError as error:
        name = "MASTER_ADDR" if os.environ.get("MASTER_ADDR") else "SLURM_STEP_NODELIST"
        raise RankError(
            f"{who}: {name}: got {launch.address!r}, which names no machine here ({error.strerror}); set MASTER_ADDR "
            "to the address of rank 0's machine"
        ) from error


def _answers(launch: Launch) -> bool:
    try:
        with socket.create_connection((launch.address, launch.port), timeout=1):
            return True
    except OSError:
        return False


def _store(launch: Launch, hosts: bool) -> dist.TCPStore:
    try:
        return dist.TCPStore(
            launch.address, launch.port, is_master=hosts, wait_for_workers=False, timeout=timedelta(seconds=GIVES_UP)
        )
    except dist.DistError as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise RankError(
                f"MASTER_PORT: {launch.port} on {launch.address} is in use; give all ranks another one"
            ) from error
        raise RankError(f"MASTER_ADDR, MASTER_PORT: no store at {launch.address}:{launch.port} ({error})") from error


def _wait(who: str, launch: Launch, missing: Callable[[], Sequence[int]]) -> None:
    """Wait until no rank is missing. RankError after `GIVES_UP` seconds."""
    began, spoke = time.monotonic(), 0.0
    while ranks := missing():
        waited = time.monotonic() - began
        others = f"rank{'s' * (len(ranks) > 1)} {listed(map(str, ranks))}"
        where = f"{others} at {launch.address}:{launch.port}"
        if waited >= GIVES_UP:
            raise RankError(f"{who} waited {waited:.0f} s for {where}; is every rank started, and is the port open?")
        if waited >= (spoke + AGAIN if spoke else SPEAKS):
            spoke = waited
            left = GIVES_UP - waited
            print(
                f"{who} waits for {where} since {waited:.0f} s; gives up in {left:.0f} s", file=sys.stderr, flush=True
            )
        time.sleep(POLL)
