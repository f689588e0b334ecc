"""Run the application until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

# How long the event loop may keep Python's lock while the engine's thread wants to start a step. Python's own 5 ms are
# a third of a step.
SWITCH_SECONDS = 0.0005
MOST_HEADER_BYTES = 64 * 2**10
PATIENCE = 30.0  # seconds in which a request's head must have come, and in which more of its body must come
# Seconds for which an idle connection stays open. Proxies and clients keep theirs for a minute, and one that the server
# closes at the moment of the next request is an error there; uvicorn's own 5 s made that happen.
KEEP_ALIVE = 75
BACKLOG = 2048  # connections that wait to be accepted, as in uvicorn


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. OSError where somebody else does, or where the host is none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(BACKLOG)  # now: two sockets that do not listen yet may have the same port
    except OSError:
        listening.close()
        raise
    return listening


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, which drops connections whose request does not come. uvicorn itself waits for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """A head has one time for all of it. A body has a time for each of its pieces: it may be large."""
        if self.conn.their_state is h11.IDLE and self._timer is not None:
            return
        self._forget()
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._timer = self.loop.call_later(PATIENCE, self._drop)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _drop(self) -> None:
        self._timer = None
        if self.flow.read_paused:  # it waits for us, not we for it
            self._watch()
        else:
            self.transport.close()


def configured(app: Any, patience: float) -> uvicorn.Config:
    """How the application is served. patience: as of `run`."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        http=PatientProtocol,  # on h11: httptools, which uvicorn takes where it is installed, has no limit of headers
        ws="none",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=round(patience),
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        server_header=False,
        lifespan="on",
    )


def run(
    app: Any,
    listening: socket.socket,
    *,
    patience: float,
    ready: Callable[[], None],
    ending: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Then nobody new is let in, and what is open may end within `patience` seconds.

    ready: called once requests are answered. ending: called when the signal has come, in the event loop.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    # What is there now stays. Python's full collections would pass over all of it, for 0.1 s each while clients wait.
    gc.collect()
    gc.freeze()
    try:
        Server(configured(app, patience), ready, ending).run(sockets=[listening])
    finally:
        gc.unfreeze()
        sys.setswitchinterval(before)


class Server(uvicorn.Server):
    """uvicorn's server, which a signal ends without an error. ready, ending: as of `run`."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], ending: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready, self._ending = ready, ending

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ending()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise the signals again at the end, and the process would seem to have failed."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
