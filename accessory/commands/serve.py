"""`accessory serve`: OpenAI's API over a model, on one rank or several."""

from __future__ import annotations

import argparse
import ipaddress
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from accessory.arguments import FREE
from accessory.commands.api_client import read_key
from accessory.commands.opening import open_model
from accessory.data.templates import get_template
from accessory.errors import InputError, MissingExtraError
from accessory.launch.environment import launch_of
from accessory.launch.gpus import default_device

log = logging.getLogger(__name__)


def serve(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit status."""
    try:
        from accessory.server.running import listen
    except ImportError as error:
        raise MissingExtraError(
            f"accessory serve needs {error.name}: pip install 'mixtral-accessory[serve]'"
        ) from error
    if options.page:
        from accessory.server.page import import_gradio

        import_gradio()  # MissingExtraError, before minutes of loading
    key = read_key(options.api_key_file, options.api_key)
    name = options.served_model_name or Path(options.pretrained_path[-1]).resolve().name
    if name in dict(options.adapter or ()):
        raise InputError(
            f"--adapter: got the name {name!r}, which is the model's; give another, or --served-model-name"
        )
    launch = launch_of()
    first = launch is None or launch.rank == 0
    if options.cache_gb is None and torch.device(options.device or default_device()).type == "cuda":
        options.cache_gb = FREE  # a server has the GPU for itself
    try:
        listening = listen(options.host, options.port) if first else nullcontext()
    except OSError as error:
        raise InputError(f"--port: {options.host}:{options.port} cannot be used ({error.strerror})") from error
    if first and key is None and not is_loopback(options.host):
        log.warning(
            "--host %s: anybody who reaches this machine may ask; give --api-key-file to guard it", options.host
        )
    with listening, open_model(options, options.with_visual) as model:
        if model is not None:  # None: a rank that follows
            _serve(options, model, name, key, listening)
    return 0


def _serve(options: argparse.Namespace, model: Any, name: str, key: str | None, listening: Any) -> None:
    from accessory.server.answers import EngineThread
    from accessory.server.app import make_app
    from accessory.server.metrics import Metrics
    from accessory.server.running import run
    from accessory.server.service import Limits, Service
    from accessory.server.visits import AccessLog, spans

    if options.warm_up:
        model.warm_up(progress=True)
    metrics = Metrics()
    thread = EngineThread(model, metrics)
    metrics.watch(thread.engine.scheduler)
    template = get_template(options.template, model.tokenizer)
    limits = Limits(hosts=frozenset(options.image_host))
    service = Service(model, thread, name=name, template=template, limits=limits)
    page = _page(options, model, name) if options.page else None
    app = make_app(
        service,
        api_key=key,
        most_bytes=options.max_body_mb * 2**20,
        page=None if page is None else page.application(),
        watchers=[watcher for watcher in (spans(), AccessLog() if options.access_log else None) if watcher],
    )
    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    also = "" if page is None else f", its page at {address}/"

    def ending() -> None:
        if page is not None:
            page.close()
            app.close_page()

    try:
        run(
            app,
            listening,
            patience=options.shutdown_timeout,
            ready=lambda: print(f"{name} answers at {address}/v1{also}; Ctrl-C ends", flush=True),
            ending=ending,
        )
    finally:
        thread.close()


def _page(options: argparse.Namespace, model: Any, name: str) -> Any:
    """A dialogue in the browser, by the same engine."""
    from accessory.server.page import Page
    from accessory.server.page_kinds import served_dialogue

    demo = served_dialogue(options.template, options.with_visual)
    return Page(demo, model, f"{name} · its API is at /v1", model.max_seq_len)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
