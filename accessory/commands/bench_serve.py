"""`accessory bench --what serve`: how quickly a server answers under load. Neither torch nor a model is loaded."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from accessory import __version__
from accessory.commands.api_client import Server, read_key
from accessory.commands.bench_figures import as_json, figures, table
from accessory.commands.bench_load import Record, measure, poisson_gaps, random_prompts, run_load
from accessory.commands.bench_plot import require_bokeh, write_plot
from accessory.commands.interrupting import first_ctrl_c
from accessory.errors import ServerError, listed
from accessory.progress import progress_bar
from accessory.train.metrics import write_whole

ASKED = ("requests", "rate", "clients", "prompt_tokens", "max_tokens", "shared_prefix", "seed")


def bench_serve(options: argparse.Namespace) -> int:
    """Returns 1 where a request failed. Raises KeyboardInterrupt after Ctrl-C, when what was measured is shown."""
    if options.plot is not None:
        require_bokeh()
    server = Server(options.target, read_key(options.api_key_file), named="URL")
    model = server.choose_model(options.model)
    prompts = random_prompts(server, model, options.prompt_tokens, options.shared_prefix, options.seed)
    bodies = [_body(options, model, ids) for ids in itertools.islice(prompts, options.requests + 1)]
    # One is sent alone, and not counted: it says what is wrong with all, and has what a first one waits for.
    first = measure(server, bodies.pop(), -1, 0.0, lambda: False)
    if first.error is not None:
        raise ServerError(first.error)
    bar = progress_bar(options.requests, "requests", unit=" requests")
    failed = 0

    def note(record: Record) -> None:
        nonlocal failed
        failed += record.error is not None
        if failed:
            bar.set_postfix_str(f"{failed} failed", refresh=False)
        bar.update()

    gaps = poisson_gaps(options.rate, options.seed) if options.rate is not None else iter(())
    with bar, first_ctrl_c() as stopped:
        records = run_load(server, bodies, clients=options.clients, gaps=gaps, stopped=stopped, on_end=note)
    interrupted = len(records) < options.requests
    found = figures(records)
    title = _title(options, model, found)
    print(title)
    print("\n".join(table(found)))
    if failed:
        print("errors: " + listed((f"{n} × {text}" for text, n in found["error_messages"].items()), between="; "))
    if options.out is not None:
        asked = {name: getattr(options, name) for name in ASKED}
        about = {"what": options.what, "url": server.url, "model": model, "version": __version__}
        whole = {**about, "asked": asked, "interrupted": interrupted, "figures": found, "records": as_json(records)}
        with write_whole(Path(options.out)) as file:
            file.write(json.dumps(whole, indent=1, ensure_ascii=False).encode())
    if options.plot is not None:
        write_plot(Path(options.plot), title, records)
    if interrupted:
        raise KeyboardInterrupt
    return int(failed > 0)


def _body(options: argparse.Namespace, model: str, ids: list[int]) -> dict[str, Any]:
    """A request whose answer has all the tokens that it may have."""
    return {
        "model": model,
        "prompt": ids,
        "max_tokens": options.max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }


def _title(options: argparse.Namespace, model: str, found: dict[str, Any]) -> str:
    how = f"{options.rate:g} a second" if options.clients is None else f"{options.clients} clients"
    shared = f" ({options.shared_prefix} of them shared)" if options.shared_prefix else ""
    return (
        f"{model} at {options.target}: {found['requests']} requests, {how}, {options.prompt_tokens} tokens{shared} + "
        f"{options.max_tokens}, {found['errors']} errors, {found['seconds']:.1f} s"
    )
