"""A server of a tiny model in this process, on a port of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from accessory.data.templates import get_template
from accessory.model.meta import MetaModel
from accessory.server.answers import EngineThread
from accessory.server.app import make_app
from accessory.server.metrics import Metrics
from accessory.server.running import listen
from accessory.server.service import Limits, Service


@contextmanager
def serving(folder: Path, *, key: str | None = None, **loading: Any) -> Iterator[tuple[str, Service]]:
    """The address of a server of this folder's model, called `tiny`, and its service."""
    model = MetaModel.from_pretrained(folder, device="cpu", **loading)
    metrics = Metrics()
    thread = EngineThread(model, metrics)
    metrics.watch(thread.engine.scheduler)
    service = Service(model, thread, name="tiny", template=get_template(None, model.tokenizer), limits=Limits())
    try:
        with running(make_app(service, api_key=key, most_bytes=2**20)) as url:
            yield url, service
    finally:
        thread.close()


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address at which an ASGI application is served while the context is open."""
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
