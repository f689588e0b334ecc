"""Ranks as processes of their own that one process, the driver, starts, watches and ends.

The driver writes to a rank's standard input where to meet (`Place`) and keeps the pipe open: its end tells the rank
that the driver is gone. The rank connects to the driver's socket (`call_back`). What both then say is not known here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from accessory.errors import RankError
from accessory.launch.ending import end_with_driver
from accessory.launch.gpus import visible_devices

GRACE = 5.0  # seconds that ranks get to end a call that was cancelled, or to say that they failed as another did
POLL = 0.1
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Which rank a process is, and where it meets the other ranks and its driver."""

    rank: int
    size: int
    host: str  # with `port`: of the store in which the ranks meet
    port: int
    threads: int  # of a rank that computes on the CPU
    address: str  # of the driver's socket
    authkey: str = field(repr=False)  # hexadecimal; who connects must know it


# --------------------------------------------------------------------------- in the driver


class RankProcess:
    """A rank's process; `connection` is there once it has called back."""

    connection: Connection

    def __init__(self, module: str, place: Place, gpu: int | None) -> None:
        """Run `python -m module` on one GPU (None: on the CPU). It must begin with `call_back`."""
        self.number = place.rank
        # Only the first rank speaks to people. What another says last is often why it ended, so that is kept.
        self._said = None if self.number == 0 else tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=None if self.number == 0 else subprocess.DEVNULL,
            stderr=self._said,
            env=_environment(gpu, place.host),
            start_new_session=True,  # Ctrl-C in the terminal is for the driver alone
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asdict(place)).encode() + b"\n")
            self._process.stdin.flush()  # and kept open: its end tells the rank that the driver is gone

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()

    def release(self) -> None:
        """After `kill`: wait for the process, give its files back."""
        self.ended(GRACE)
        for end in (getattr(self, "connection", None), self._process.stdin, self._said):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.close()

    def ended(self, patience: float) -> bool:
        """Whether it ends within so many seconds."""
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            return False
        return True

    def how_it_ended(self) -> str:
        code = self._process.returncode
        how = f"rank {self.number} was ended by signal {-code}" if code < 0 else f"rank {self.number} ended ({code})"
        said = self._last_words()
        return f"{how}, saying {said!r}," if said else how

    def _last_words(self) -> str:
        if self._said is None:
            return ""
        size = os.fstat(self._said.fileno()).st_size
        tail = os.pread(self._said.fileno(), 4096, max(0, size - 4096)).decode(errors="replace")
        lines = [line.strip()[:200] for line in tail.splitlines() if line.strip()]
        telling = [line for line in lines if re.search("error|terminate|abort", line, re.IGNORECASE)]
        return (telling or lines or [""])[-1]


def start_processes(
    module: str, gpu_ids: Sequence[int | None], host: str, port: int, patience: float, ranks: list[RankProcess]
) -> None:
    """Start `python -m module` for each of `gpu_ids` (None: on the CPU) and wait until all have called back.

    host, port: of the store in which they meet. Those started are put in `ranks` at once, so that the caller can end
    them whatever happens. RankError where one ends, or says nothing for `patience` seconds.
    """
    import torch  # here: a rank that calls back has not read it yet, and shall answer at once

    n = len(gpu_ids)
    authkey = secrets.token_bytes(32)
    threads = max(1, torch.get_num_threads() // n)
    with tempfile.TemporaryDirectory(prefix="accessory-") as folder:
        address = os.path.join(folder, "driver")
        with Listener(address, family="AF_UNIX", backlog=n, authkey=authkey) as listener:
            for number, gpu in enumerate(gpu_ids):
                place = Place(number, n, host, port, threads, address, authkey.hex())
                ranks.append(RankProcess(module, place, gpu))
            _accept(listener, ranks, patience)


def who_ended(ranks: Sequence[RankProcess], patience: float) -> str:
    """Which ranks ended and how, as soon as one has; "" where none does within `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (dead := [rank for rank in ranks if rank.ended(0)]) and time.monotonic() < deadline:
        time.sleep(POLL / 10)
    return ", ".join(rank.how_it_ended() for rank in dead)


def end_processes(ranks: Sequence[RankProcess]) -> None:
    """Kill all, then wait for them and give their files back."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.release()


def _environment(gpu: int | None, host: str) -> dict[str, str]:
    package = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible_devices([gpu])
    if host == LOOPBACK and "lo" in (name for _, name in socket.if_nameindex()):
        # Else gloo listens where this machine's name points: in reach of others, or nowhere on a laptop off its net.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _accept(listener: Listener, ranks: list[RankProcess], patience: float) -> None:
    """A connection from every rank; a process that dies before it connects must not be waited for."""
    connections: dict[int, Connection] = {}

    def accept() -> None:
        with contextlib.suppress(OSError, EOFError):
            while len(connections) < len(ranks):
                connection = listener.accept()
                connections[connection.recv()] = connection

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    deadline = time.monotonic() + patience
    while thread.is_alive():
        thread.join(POLL)
        if how := who_ended(ranks, 0):
            raise RankError(f"{how} before it could load")
        if time.monotonic() > deadline:
            raise RankError(f"the ranks did not start within {patience:.0f} s")
    if missing := [str(rank.number) for rank in ranks if rank.number not in connections]:
        raise RankError(f"rank {', '.join(missing)} broke off before it could load; see the first rank's messages")
    for rank in ranks:
        rank.connection = connections[rank.number]


# --------------------------------------------------------------------------- in a rank


def call_back() -> tuple[Place, Connection]:
    """Read from standard input where to meet and connect to the driver. From now on its end is this process's end."""
    place = Place(**json.loads(sys.stdin.readline()))
    end_with_driver()
    connection = Client(place.address, authkey=bytes.fromhex(place.authkey))
    connection.send(place.rank)
    return place, connection
