"""What is told of each request when it has ended: a line of the access log, and a span of OpenTelemetry.

Neither has contents: no prompt, no answer, no query, no key.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from accessory.server.jobs import Job, usage_so_far
from accessory.server.protocol import CompletionRequest

# An id that a client gave is kept if it can stand in a line and in a header.
_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_LONGEST_PATH = 200


@dataclass
class Visit:
    """A request to the API or for the page. job: its answers, where it got as far as to have some."""

    method: str
    path: str  # as it was sent, without its query
    id: str
    headers: Mapping[bytes, bytes]
    is_page: bool = False
    status: int = 0  # 0: the client left before it got an answer
    job: Job | None = None
    began: float = field(default_factory=time.monotonic)
    began_ns: int = field(default_factory=time.time_ns)  # since 1970

    @classmethod
    def of(cls, scope: Any) -> Visit:
        headers = dict(scope["headers"])
        raw = scope.get("raw_path") or scope["path"].encode("utf-8", "backslashreplace")
        path = "".join(chr(byte) if 32 < byte < 127 else f"%{byte:02X}" for byte in raw[:_LONGEST_PATH])
        given = headers.get(b"x-request-id", b"")
        made = given.decode() if _ID.fullmatch(given) else f"req-{secrets.token_hex(16)}"
        return cls(scope["method"], path, made, headers)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def tokens(self) -> tuple[int, int]:
        """Of the prompts, and of the answers so far."""
        if self.job is None:
            return 0, 0
        used = usage_so_far(self.job)
        return used["prompt_tokens"], used["completion_tokens"]

    @property
    def first_token(self) -> float | None:
        """Seconds from the request to the first token of an answer."""
        firsts = [] if self.job is None else [a.first for a in self.job.answers if a.first is not None]
        return min(firsts) - self.began if firsts else None


Watcher = Callable[[Visit], None]


def access_line(visit: Visit) -> str:
    """`POST /v1/completions 200 812 ms, 12 tokens in, 40 out, req-…`."""
    read, written = visit.tokens
    how_long = f"{1000 * visit.seconds:.0f} ms"
    return f"{visit.method} {visit.path} {visit.status} {how_long}, {read} tokens in, {written} out, {visit.id}"


class AccessLog:
    """Writes a line a request on standard error. Of the page's requests, those that failed: a page makes many."""

    def __init__(self) -> None:
        self._log = logging.getLogger("accessory.access")
        self._log.setLevel(logging.INFO)
        self._log.propagate = False
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._log.handlers = [handler]

    def __call__(self, visit: Visit) -> None:
        if not visit.is_page or visit.status >= 400:
            self._log.info("%s", access_line(visit))


def spans() -> Watcher | None:
    """Makes a span of each request to the API, with the names of OpenTelemetry's conventions for generative AI.

    None where the package opentelemetry-api is missing. Where spans go to is set up outside, as by
    `opentelemetry-instrument`.
    """
    try:
        from opentelemetry import propagate, trace
    except ImportError:
        return None
    tracer = trace.get_tracer("accessory")

    def tell(visit: Visit) -> None:
        if visit.is_page:
            return
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in visit.headers.items()}
        attributes: dict[str, Any] = {
            "http.request.method": visit.method,
            "url.path": visit.path,
            "http.response.status_code": visit.status,
            "accessory.request_id": visit.id,
        }
        name = f"{visit.method} {visit.path}"
        if visit.job is not None:
            model = visit.job.body.model
            operation = "text_completion" if isinstance(visit.job.body, CompletionRequest) else "chat"
            read, written = visit.tokens
            name = f"{operation} {model}"
            attributes |= {
                "gen_ai.operation.name": operation,
                "gen_ai.request.model": model,
                "gen_ai.usage.input_tokens": read,
                "gen_ai.usage.output_tokens": written,
            }
            if visit.first_token is not None:
                attributes["gen_ai.server.time_to_first_token"] = visit.first_token
        span = tracer.start_span(
            name, propagate.extract(carrier), trace.SpanKind.SERVER, attributes, start_time=visit.began_ns
        )
        if visit.status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        span.end(visit.began_ns + round(1e9 * visit.seconds))

    return tell
