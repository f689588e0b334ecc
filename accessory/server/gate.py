"""In front of all routes: who may ask, how large a request may be, and whether the API or the page answers it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.routing import Route

from accessory.server.failures import ApiError
from accessory.server.metrics import Metrics
from accessory.server.visits import Visit, Watcher

OPEN_TO_ALL = "/health"  # the one route without a key: what starts the server must be able to ask


class Gate:
    """In front of the API, and of the page where there is one: who may ask, and how much.

    It counts a body's bytes while they arrive. A browser gives the page's key as a password (RFC 7617, any name): it
    then sends it with all that the page fetches, and nothing of the page is to be had without.
    """

    def __init__(
        self,
        app: FastAPI,
        api_key: str | None,
        most_bytes: int,
        metrics: Metrics,
        page: Any = None,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self._watchers = watchers
        self.app, self._page, self._most_bytes, self._metrics = app, page, most_bytes, metrics
        self._visits: set[asyncio.Task[None]] = set()
        self._closing = False
        self._apis = {_first_part(route.path) for route in app.routes if isinstance(route, Route)}
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":  # the server begins or ends, which only the page has to know
            await (self._page or self.app)(scope, receive, send)
            return
        visit = Visit.of(scope)
        visit.is_page = self._page is not None and _first_part(scope["path"]) not in self._apis
        state = scope.setdefault("state", {})

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", visit.id.encode())]}
            await send(message)

        try:
            await self._let_in(scope, receive, named, visit.is_page)
        finally:
            visit.job = state.get("job")
            for watcher in self._watchers:
                watcher(visit)

    async def _let_in(self, scope: Any, receive: Any, send: Any, is_page: bool) -> None:
        headers = dict(scope["headers"])
        if scope["path"] != OPEN_TO_ALL and not self._knows(_given(headers), is_page):
            way = "give it as the password, with any name" if is_page else "send it as Authorization: Bearer KEY"
            denied = ApiError(
                f"Incorrect API key provided, or none; {way}",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Basic realm="accessory", charset="UTF-8"' if is_page else "Bearer"},
            )
            await self._refusal(denied)(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most_bytes:
            await self._too_large()(scope, receive, send)
            return
        arrived = 0

        async def counted() -> Any:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            # The application then sees the end of a body, and whatever it says to that is not sent.
            return message if arrived <= self._most_bytes else {"type": "http.request", "body": b"", "more_body": False}

        async def unless_too_large(message: Any) -> None:
            if arrived <= self._most_bytes:
                await send(message)

        await (self._visit if is_page else self.app)(scope, counted, unless_too_large)
        if arrived > self._most_bytes:
            await self._too_large()(scope, receive, send)

    async def _visit(self, scope: Any, receive: Any, send: Any) -> None:
        """A request for the page, which ends when the page is closed."""
        task, begun, ended = asyncio.current_task(), False, False
        assert task is not None
        assert self._page is not None

        async def noted(message: Any) -> None:
            nonlocal begun, ended
            begun, ended = True, message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        self._visits.add(task)
        try:
            await self._page(scope, receive, noted)
        except BaseException:  # Gradio's own code raises other errors when its tasks are cancelled
            if not self._closing:
                raise
            if not begun:
                await send({"type": "http.response.start", "status": 503, "headers": []})
            if not ended:
                await send({"type": "http.response.body", "body": b""})
        finally:
            self._visits.discard(task)

    def close_page(self) -> None:
        """End the page's requests. Browsers would keep a connection open as long as they show it."""
        self._closing = True
        for task in self._visits:
            task.cancel()

    def _knows(self, given: bytes, is_page: bool) -> bool:
        if self._key is None:
            return True
        kind, _, key = given.partition(b" ")
        if is_page and kind.lower() == b"basic":
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif kind.lower() != b"bearer":
            return False
        return hmac.compare_digest(key.strip(), self._key)

    def _too_large(self) -> JSONResponse:
        what = f"the request's body has more than {self._most_bytes} bytes"
        return self._refusal(ApiError(what, status=413, code="too_large"))

    def _refusal(self, error: ApiError) -> JSONResponse:
        self._metrics.errors.labels(error.status).inc()
        return JSONResponse(error.body(), error.status, error.headers)


def _given(headers: dict[bytes, bytes]) -> bytes:
    """The key as it was sent. Clients of Anthropic's API have a header of their own for it."""
    if (own := headers.get(b"x-api-key")) is not None and b"authorization" not in headers:
        return b"Bearer " + own
    return headers.get(b"authorization", b"")


def _first_part(path: str) -> str:
    return path.split("/")[1] if "/" in path else path
