"""Ranks as separate processes, which one process, the driver, starts, watches and ends.

The driver writes a `Place` to a rank's standard input and keeps the pipe open. When the pipe ends, the rank knows that
the driver is gone. The rank connects to the driver's socket (`call_back`). This module does not define the messages
that they then exchange.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import struct
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

GRACE = 5.0  # seconds for ranks to end a cancelled call, or to report the same failure as another rank
POLL = 0.1  # seconds
SPEAKS = 2.0  # seconds after which the driver says on a terminal that it is starting ranks
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """A process's rank, and the addresses of the other ranks' store and of the driver."""

    rank: int
    size: int
    host: str  # host and port of the store through which the ranks meet
    port: int
    threads: int  # CPU threads of a rank that computes on the CPU
    address: str  # of the driver's socket
    authkey: str = field(repr=False)  # hexadecimal; the key that the driver's socket asks for


# --------------------------------------------------------------------------- in the driver


class RankProcess:
    """A rank's process. `connection` exists once the process has called back."""

    connection: Connection

    def __init__(self, module: str, place: Place, gpu: int | None) -> None:
        """Run `python -m module` on one GPU (None: on the CPU). It must begin with `call_back`."""
        self.number = place.rank
        # Only the first rank prints to the terminal. The last lines of another rank often say why it ended, so its
        # standard error goes to a file.
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
            self._process.stdin.flush()  # stays open: its end tells the rank that the driver is gone

    def limit(self, seconds: float) -> None:
        """Let a message that does not move for so long fail with BlockingIOError, instead of waiting for ever."""
        wait = struct.pack("ll", min(int(seconds), 10**6), int(seconds % 1 * 1e6))
        with socket.socket(fileno=os.dup(self.connection.fileno())) as end:
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                end.setsockopt(socket.SOL_SOCKET, option, wait)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()

    def release(self) -> None:
        """After `kill`: wait for the process, then close its connection and its files."""
        self.ended(GRACE)
        for end in (getattr(self, "connection", None), self._process.stdin, self._said):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.close()

    def ended(self, patience: float) -> bool:
        """Whether the process ends within `patience` seconds."""
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

    host, port: of the store through which they meet. Each started process is added to `ranks` at once, so that the
    caller can end them after any error. RankError where one ends, or where not all call back within `patience` seconds.
    """
    import torch  # here, because a rank imports this module too and must call back before it imports torch

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
    """Wait until a rank has ended, then say which ranks ended and how; "" where none ends within `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (dead := [rank for rank in ranks if rank.ended(0)]) and time.monotonic() < deadline:
        time.sleep(POLL / 10)
    return ", ".join(rank.how_it_ended() for rank in dead)


def end_processes(ranks: Sequence[RankProcess]) -> None:
    """Kill all processes, then wait for them and close their connections and files."""
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
        # Otherwise gloo listens on the address of this machine's name. Others can reach that address, and on a laptop
        # without its network it may not exist.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _accept(listener: Listener, ranks: list[RankProcess], patience: float) -> None:
    """Accept a connection from every rank. Stops waiting when a process dies before it connects."""
    connections: dict[int, Connection] = {}

    def accept() -> None:
        with contextlib.suppress(OSError, EOFError):
            while len(connections) < len(ranks):
                connection = listener.accept()
                connections[connection.recv()] = connection

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    began = time.monotonic()
    deadline, quiet = began + patience, sys.stderr.isatty()
    while thread.is_alive():
        thread.join(POLL)
        if quiet and time.monotonic() > began + SPEAKS:
            quiet = False
            print(f"starting {len(ranks)} ranks …", file=sys.stderr, flush=True)
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
    """Read the `Place` from standard input and connect to the driver. From now on this process ends with the driver."""
    place = Place(**json.loads(sys.stdin.readline()))
    end_with_driver()
    connection = Client(place.address, authkey=bytes.fromhex(place.authkey))
    connection.send(place.rank)
    return place, connection
