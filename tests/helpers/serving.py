"""A server of a tiny model in this process: `serving`. Its event loop runs in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import uvicorn

from accessory.data.templates import get_template
from accessory.model.text_model import TextModel
from accessory.server.answers import EngineThread
from accessory.server.app import make_app
from accessory.server.metrics import Metrics
from accessory.server.running import configured, listen
from accessory.server.service import Limits, Service
from helpers.traffic import check_empty

NAME = "tiny"


@dataclass
class Serving:
    """A server under way, and clients of it."""

    url: str
    model: TextModel
    service: Service
    thread: EngineThread
    raw: httpx.Client
    openai: openai.OpenAI

    def post(self, route: str, **body: Any) -> httpx.Response:
        return self.raw.post(route, json={"model": NAME, **body})

    def metric(self, name: str, **labels: str) -> float:
        """A number of /metrics, 0 where it is not there."""
        inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
        wanted = f"accessory:{name}" + (f"{{{inner}}}" if inner else "")
        lines = (line.rsplit(" ", 1) for line in self.raw.get("/metrics").text.splitlines())
        return sum(float(number) for found, number in lines if found == wanted)

    def settle(self, seconds: float = 20) -> None:
        """Wait until nothing is open, and check that nothing is held."""
        eventually(lambda: not self.thread._open, seconds)
        check_empty(self.thread.engine)


@contextmanager
def serving(
    model: TextModel,
    *,
    template: str | None = None,
    api_key: str | None = None,
    most_bytes: int = 16 * 2**20,
    limits: Limits | None = None,
    page: Any = None,
    watchers: Sequence[Callable[[Any], None]] = (),
) -> Iterator[Serving]:
    metrics = Metrics()
    thread = EngineThread(model, metrics)
    metrics.watch(thread.engine.scheduler)
    made = get_template(template, model.tokenizer)
    service = Service(model, thread, name=NAME, template=made, limits=limits or Limits())
    server = uvicorn.Server(
        configured(make_app(service, api_key=api_key, most_bytes=most_bytes, page=page, watchers=watchers), 5)
    )
    with listen("127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        loop = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        loop.start()
        eventually(lambda: server.started)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0, timeout=60)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            with httpx.Client(base_url=url, timeout=60, headers=headers, verify=False) as raw, client:
                yield Serving(url, model, service, thread, raw, client)
        finally:
            server.should_exit = True
            loop.join(20)
            thread.close()


def eventually(true: Callable[[], Any], seconds: float = 20) -> None:
    """Wait until it is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def check_error(answer: httpx.Response, status: int, param: str | None = None, *words: str) -> dict[str, Any]:
    """Check an answer to be an error of OpenAI's form, of one line, about this field."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert error["param"] == param, error
    for word in words:
        assert word in error["message"], error
    return error
