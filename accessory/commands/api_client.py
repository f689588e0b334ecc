"""A client of OpenAI's API, as small as the commands need it: what a server has, and answers piece by piece.

It is the standard library's HTTP. No torch is imported, and no package that is an extra.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.parse
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accessory.errors import InputError, ServerError, listed

CONNECTING = 10.0  # seconds until a server counts as not there
WAITING = 600.0  # seconds between two pieces of an answer: its turn may come late
KEY_VARIABLE = "ACCESSORY_API_KEY"


def read_key(file: str | None, key: str | None = None) -> str | None:
    """The key in a file's first line, one given as it is, or the variable's; None where there is none."""
    if file is not None:
        lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
        key, named = lines[0].strip() if lines else "", f"--api-key-file: {file}"
    elif key is not None:
        named = "--api-key"
    else:
        key, named = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
        if key is None:
            return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{named}: the key must be a word of printable ASCII characters")
    return key


class Server:
    """The server at an address, http://host:port or the same with /v1. named: the option that gave the address."""

    def __init__(self, url: str, key: str | None = None, named: str = "--url") -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            self._host, self._port = parts.hostname, parts.port
        except ValueError:  # a port that is no number
            parts, self._host = urllib.parse.urlsplit(""), None
        if parts.scheme not in ("http", "https") or not self._host:
            raise InputError(f"{named}: got {url!r:.100}, but it must be http://host:port or https://host")
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._key, self.url, self.named = key, url, named

    def models(self) -> list[dict[str, Any]]:
        """What the server has: the entries of /v1/models."""
        found = self.ask("GET", "/v1/models").get("data")
        if not isinstance(found, list) or not all(isinstance(m, dict) and "id" in m for m in found):
            raise ServerError(f"{self.named}: {self.url} is no server of OpenAI's API: /v1/models is no list of models")
        return found

    def choose_model(self, wanted: str | None) -> str:
        """The name that requests give: `wanted`, or that of the only model. InputError where the server has neither.

        Adapters, which name their model as their parent, count as models only where they are asked for.
        """
        found = self.models()
        names = [model["id"] for model in found]
        if wanted is not None:
            if wanted not in names:
                raise InputError(f"--model: got {wanted!r:.100}, but {self.url} has {_some(names)}")
            return wanted
        own = [model["id"] for model in found if model.get("parent") is None]
        if len(own) != 1:
            raise InputError(f"--model: {self.url} has {_some(own)}; name one of them")
        return own[0]

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The object that a request is answered with."""
        with self._answer(method, path, body) as answer:
            return self._object(answer.read())

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        """The events of an answer as they come. ServerError where one is an error, or where the stream breaks off."""
        with self._answer("POST", path, {**body, "stream": True}) as answer:
            while line := answer.readline():
                kind, _, data = line.decode("utf-8", errors="replace").partition(":")
                if kind != "data":
                    continue
                if data.strip() == "[DONE]":
                    return
                event = self._object(data)
                if "error" in event:
                    raise ServerError(f"{self.url} ended the answer with an error: {_message(event)}")
                yield event
        raise ServerError(f"{self.url} broke the answer off")

    @contextmanager
    def _answer(self, method: str, path: str, body: dict[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        """An answer that is no error, open. Closing it tells the server that nobody reads on."""
        connection = self._connection(self._host or "", self._port, timeout=CONNECTING)
        headers = {"Accept": "application/json, text/event-stream"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.connect()
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServerError(
                f"{self.named}: nothing answers at {self.url} ({why}); accessory serve PATH starts a server"
            ) from error
        try:
            connection.sock.settimeout(WAITING)
            content = None if body is None else json.dumps(body).encode()
            if content is not None:
                headers["Content-Type"] = "application/json"
            connection.request(method, self._root + path, content, headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise self._refused(answer.status, answer.read(), path)
            yield answer
        except (http.client.HTTPException, OSError) as error:
            raise ServerError(f"{self.url} broke the answer off ({str(error) or type(error).__name__})") from error
        finally:
            connection.close()

    def _refused(self, status: int, content: bytes, path: str) -> ServerError:
        try:
            said = _message(json.loads(content))
        except ValueError:
            said = "no explanation"
        if status in (401, 403):
            given = "refuses the key" if self._key is not None else "wants a key"
            return ServerError(f"--api-key-file: {self.url} {given}; give its own there or in {KEY_VARIABLE} ({said})")
        if status in (404, 405) and said in ("no explanation", "Not Found"):
            return ServerError(f"{self.named}: {self.url} is no server of OpenAI's API: it has no {path}")
        return ServerError(f"{self.url} answered with status {status}: {said}")

    def _object(self, content: bytes | str) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ServerError(f"{self.named}: {self.url} is no server of OpenAI's API: it does not answer in JSON")
        return found


def _message(body: Any) -> str:
    """What an error says, in one line."""
    error = body.get("error", body) if isinstance(body, dict) else body
    found = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return " ".join(str(found or "no explanation").split())


def _some(names: list[str]) -> str:
    return listed(names) if names else "no model"
