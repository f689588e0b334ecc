"""Ends a rank that hangs in a step because another rank is gone: `Peers`.

A collective on a GPU waits for ever for a rank that was killed, and nothing in the process can interrupt it. So every
rank holds a connection to the first one. When it breaks, a thread waits for a moment and ends the process, if it still
waits in a step. Under torchrun it says nothing then: the launcher says which rank ended first.

torch is not imported here.
"""

from __future__ import annotations

import atexit
import contextlib
import hmac
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accessory.errors import AccessoryError, RankError

PATIENCE = 8.0  # seconds in which a step may end by itself, with a better error, once a rank is gone
_CONNECT = 10.0
_NOTICED = 2.0  # seconds within which a broken connection explains an error of a collective
_GONE = "another rank is gone in the middle of a step"
_BYE = b"b"  # a rank says it where it ends as it should


class Peers:
    """The connections of this rank, `rank` of `size`, with the others. `share(value)` gives every rank the first one's
    value. Where the ranks cannot reach each other so, nothing is watched."""

    def __init__(self, rank: int, size: int, share: Callable[[Any], Any]) -> None:
        self._rank = rank
        self._busy = 0
        self._quiet = "TORCHELASTIC_RUN_ID" in os.environ
        self._gone = threading.Event()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        if rank == 0:
            listening = socket.create_server(("", 0), backlog=size)
            token = secrets.token_bytes(16)
            share((_addresses(), listening.getsockname()[1], token))
            threading.Thread(target=self._accept, args=(listening, size - 1, token), daemon=True).start()
        else:
            addresses, port, token = share(None)
            threading.Thread(target=self._connect, args=(addresses, port, token), daemon=True).start()
        atexit.register(self.close)

    @contextmanager
    def step(self) -> Iterator[None]:
        """While a step is computed that needs the other ranks."""
        with self._lock:
            self._busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1

    @contextmanager
    def run(self) -> Iterator[None]:
        """While all that is done needs the other ranks, as a training run does.

        gloo raises an error where another rank is gone. It becomes a RankError; under torchrun this process ends.
        """
        with self.step():
            try:
                yield
            except RuntimeError as error:
                if isinstance(error, AccessoryError) or not self._gone.wait(_NOTICED):
                    raise
                if self._quiet:
                    os._exit(1)
                raise RankError(_GONE) from error
        self.close()

    def close(self) -> None:
        """Say goodbye, unless an error ends this process: then the others must not wait for it."""
        sockets, self._sockets = self._sockets, []
        for connection in sockets:
            with contextlib.suppress(OSError):
                if getattr(sys, "last_type", None) is None:
                    connection.sendall(_BYE)
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listening: socket.socket, others: int, token: bytes) -> None:
        listening.settimeout(_CONNECT)
        with listening, contextlib.suppress(OSError):
            while others:
                connection, _ = listening.accept()
                connection.settimeout(_CONNECT)
                with contextlib.suppress(OSError):
                    if hmac.compare_digest(connection.recv(len(token), socket.MSG_WAITALL), token):
                        others -= 1
                        self._watch(connection)

    def _connect(self, addresses: list[str], port: int, token: bytes) -> None:
        for address in addresses:
            with contextlib.suppress(OSError):
                connection = socket.create_connection((address, port), timeout=_CONNECT / len(addresses))
                connection.sendall(token)
                self._watch(connection)
                return

    def _watch(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        self._sockets.append(connection)
        threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        try:
            said = connection.recv(1)
        except OSError:
            said = b""
        if said != _BYE and connection in self._sockets:
            self._gone.set()
            self._end_if_stuck()

    def _end_if_stuck(self) -> None:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            time.sleep(0.1)
            if not self._busy:  # it says itself what is wrong, with the next step at the latest
                return
        if not self._quiet:
            print(f"accessory: error: rank {self._rank}: {_GONE}", file=sys.stderr, flush=True)
        os._exit(1)


def _addresses() -> list[str]:
    """Where other ranks may reach this one, the likeliest first."""
    found = ["127.0.0.1"] if os.environ.get("MASTER_ADDR", "localhost") in ("localhost", "127.0.0.1", "::1") else []
    found += [os.environ["MASTER_ADDR"]] if "MASTER_ADDR" in os.environ else []
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET)]
    return list(dict.fromkeys([*found, name, "127.0.0.1"]))
