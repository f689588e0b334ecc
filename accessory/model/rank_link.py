"""Starting the processes of a `MultiGpuWrapper`, and the driver's end of the line to each."""

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
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from accessory.errors import InputError, RankError

GRACE = 5.0  # seconds that ranks get to end a call that was cancelled, or to say that they failed as another did
POLL = 0.1
LOOPBACK = "127.0.0.1"


class Rank:
    """A rank's process; `connection` is there once it has called back."""

    connection: Connection

    def __init__(self, number: int, gpu: int | None, where: dict[str, Any]) -> None:
        self.number = number
        # Only the first rank speaks to people. What another says last is often why it ended, so that is kept.
        self._said = None if number == 0 else tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "accessory.model.rank_process"],
            stdin=subprocess.PIPE,
            stdout=None if number == 0 else subprocess.DEVNULL,
            stderr=self._said,
            env=_environment(gpu, where["host"]),
            start_new_session=True,  # Ctrl-C in the terminal is for the driver alone
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({**where, "rank": number}).encode() + b"\n")
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


def _environment(gpu: int | None, host: str) -> dict[str, str]:
    package = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    if host == LOOPBACK and "lo" in (name for _, name in socket.if_nameindex()):
        # Else gloo listens where this machine's name points: in reach of others, or nowhere on a laptop off its net.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def host_store(host: str, port: int) -> Any:
    """The store in which the ranks meet, on a port of `host` alone (0: a free one); InputError where there is none."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
    except OSError as error:
        raise InputError(f"master_addr: got {host!r}, which names no address ({error.strerror})") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno == 98 or "in use" in str(error):
            raise InputError(
                f"master_port: {port} on {host} is in use; give another one, or leave it out for a free one"
            ) from error
        raise InputError(
            f"master_addr, master_port: cannot listen on {host} port {port} ({error.strerror}); "
            "leave them out, or give an address and a free port of this machine"
        ) from error
    # torch alone would listen on every interface, and whoever reaches a store may write to it.
    number = listening.getsockname()[1]
    return dist.TCPStore(host, number, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def start_ranks(gpu_ids: Sequence[int | None], host: str, port: int, patience: float, ranks: list[Rank]) -> None:
    """Start a process for each of `gpu_ids` (None: on the CPU) and wait until all have called back.

    Those started are put in `ranks` at once, so that the caller can end them whatever happens.
    """
    authkey = secrets.token_bytes(32)
    where: dict[str, Any] = {"authkey": authkey.hex(), "size": len(gpu_ids), "host": host, "port": port}
    where["threads"] = max(1, torch.get_num_threads() // len(gpu_ids))
    with tempfile.TemporaryDirectory(prefix="accessory-") as folder:
        where["address"] = os.path.join(folder, "driver")
        with Listener(where["address"], family="AF_UNIX", backlog=len(gpu_ids), authkey=authkey) as listener:
            for number, gpu in enumerate(gpu_ids):
                ranks.append(Rank(number, gpu, where))
            _accept(listener, ranks, patience)


def _accept(listener: Listener, ranks: list[Rank], patience: float) -> None:
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
        if dead := [rank for rank in ranks if rank.ended(0)]:
            raise RankError(f"{dead[0].how_it_ended()} before it could load")
        if time.monotonic() > deadline:
            raise RankError(f"the ranks did not start within {patience:.0f} s")
    if missing := [str(rank.number) for rank in ranks if rank.number not in connections]:
        raise RankError(f"rank {', '.join(missing)} broke off before it could load; see the first rank's messages")
    for rank in ranks:
        rank.connection = connections[rank.number]
