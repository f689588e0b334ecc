"""Sends requests to a server, at random moments or by clients that wait for their answers, and times what comes."""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from accessory.commands.api_client import Server
from accessory.errors import AccessoryError, ServerError, one_line

# Their ids, in any order, make prompts that no tokenizer finds odd.
WORDS = (
    "the river ran past an old stone house where nine people kept bees and sold honey every summer to visitors who "
    "came by train from a distant city because its markets had nothing like that dark sweet taste of thyme clover and "
    "rain while children climbed trees watching clouds turn grey above quiet hills before evening light faded into blue"
)
_LOOKING = 0.1  # seconds between two looks at whether the load is to stop


@dataclass
class Record:
    """One request: when it was sent, and when pieces of its answer came, in seconds after the load began."""

    number: int
    sent: float
    pieces: list[float] = field(default_factory=list)  # those that hold text
    ended: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    error: str | None = None


def random_prompts(server: Server, model: str, tokens: int, shared: int, seed: int) -> Iterator[list[int]]:
    """Prompts without end, as ids. The first `shared` ids of all are the same."""
    asked = {"model": model, "prompt": WORDS, "add_special_tokens": False}
    ids = server.ask("POST", "/tokenize", asked).get("tokens")
    if not isinstance(ids, list) or len(ids) < 2:
        raise ServerError(f"{server.named}: {server.url} does not say which tokens a text has (/tokenize)")
    known = sorted(set(ids))
    draw = random.Random(seed)
    beginning = draw.choices(known, k=shared)
    while True:
        yield beginning + draw.choices(known, k=tokens - shared)


def poisson_gaps(rate: float, seed: int) -> Iterator[float]:
    """Seconds from each arrival to the next one, without end."""
    draw = random.Random(seed)
    while True:
        yield draw.expovariate(rate)


def measure(server: Server, body: dict[str, Any], number: int, began: float, stopped: Callable[[], bool]) -> Record:
    """Send one request, and note what comes. Of one that is stopped, `ended` stays 0."""
    record = Record(number, time.perf_counter() - began)
    try:
        with closing(server.stream("/v1/completions", body)) as events:
            for event in events:
                if stopped():
                    return record
                if any(choice.get("text") for choice in event.get("choices", ())):
                    record.pieces.append(time.perf_counter() - began)
                if used := event.get("usage"):
                    record.prompt_tokens, record.tokens = used["prompt_tokens"], used["completion_tokens"]
                    record.cached_tokens = (used.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    except AccessoryError as error:
        record.error = one_line(error)
    record.ended = time.perf_counter() - began
    return record


def run_load(
    server: Server,
    bodies: Sequence[dict[str, Any]],
    *,
    clients: int | None,
    gaps: Iterator[float],
    stopped: threading.Event,
    on_end: Callable[[Record], None],
) -> list[Record]:
    """Send all requests: by so many clients, each of which waits for its answer before it asks again; or, where clients
    is None, whether answers come or not, `gaps` seconds after one another.

    Returns what ended until `stopped` was set, in the order of the requests.
    """
    began = time.perf_counter()
    done: queue.Queue[Record | BaseException] = queue.Queue()
    left = iter(enumerate(bodies))
    lock = threading.Lock()

    def send(number: int, body: dict[str, Any]) -> None:
        try:
            done.put(measure(server, body, number, began, stopped.is_set))
        except BaseException as error:  # a bug: the main thread raises it
            done.put(error)

    def client() -> None:
        while not stopped.is_set():
            with lock:
                found = next(left, None)
            if found is None:
                return
            send(*found)

    def arrivals() -> None:
        due = began
        for number, body in left:
            due += next(gaps)
            if stopped.wait(max(0.0, due - time.perf_counter())):
                return
            threading.Thread(target=send, args=(number, body), daemon=True).start()

    senders = [arrivals] if clients is None else list(itertools.repeat(client, min(clients, len(bodies))))
    for sender in senders:
        threading.Thread(target=sender, daemon=True).start()
    records: list[Record] = []
    try:
        while len(records) < len(bodies) and not stopped.is_set():
            try:
                found = done.get(timeout=_LOOKING)
            except queue.Empty:
                continue
            if isinstance(found, BaseException):
                raise found
            if found.ended:
                records.append(found)
                on_end(found)
    finally:
        stopped.set()
    return sorted(records, key=lambda record: record.number)
