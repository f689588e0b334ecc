"""Shared by all demos besides their page: parses arguments, starts a model on one rank or several, serves and ends."""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from accessory.command_line import Parser
from accessory.errors import InputError, is_users, one_line
from accessory.launch.ending import FIRST_SPEAKS, end_within, watch_torchrun
from accessory.launch.environment import launch_of, set_meeting_point
from accessory.launch.gpus import count_ranks, use_gpus, visible_gpus
from accessory.launch.process_group import join_launched, leave_group
from accessory.model.meta import MetaModel
from accessory.model.options import (
    add_image_transform,
    add_model_options,
    add_option,
    loading_arguments,
    port_number,
    torch_dtype,
)
from accessory.parallel.mesh import Ranks
from accessory.server.page import Demo, Page, import_gradio

ENDING = (signal.SIGINT, signal.SIGTERM)
GRACE = 8.0  # seconds after Ctrl-C after which the process ends in any case

Serve = Callable[[Any, str], int]  # (model, a line about it) -> exit status
Start = Callable[[argparse.Namespace, Serve], int]


# --------------------------------------------------------------------------- arguments


def parser(program: str, about: str, images: bool = False) -> Parser:
    """A parser with the options of all demos; with `images`, also those for images. Names may have dashes or
    underscores."""
    p = Parser(prog=program, description=about)
    add_model_options(p, demo=True)
    if images:
        add_image_transform(p)
    add_option(p, "host", default="127.0.0.1", help="the address to serve on (default: 127.0.0.1, this machine alone)")
    about = "the port to serve on, 0 for any free one (default: 7860)"
    add_option(p, "port", type=port_number, default=7860, help=about)
    add_option(p, "share", action="store_true", help="also give the page a public address, through Gradio's servers")
    add_option(p, "debug", action="store_true", help="show tracebacks and what is going on")
    return p


# --------------------------------------------------------------------------- a demo's life


def run(demo: Demo, options: argparse.Namespace, start: Start) -> int:
    """Start the model and serve the page until Ctrl-C. Returns the exit status. Prints a user's mistake as one line."""
    rank = 0
    logging.basicConfig(level=logging.INFO if options.debug else logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        launch = launch_of()
        rank = launch.rank if launch is not None else 0
        if rank == 0:
            for number in ENDING:
                signal.signal(number, _interrupt)
            import_gradio()
            options.port = _free_port(options.host, options.port)  # before minutes of loading
        return start(options, lambda model, line: _serve(demo, model, line, options))
    except KeyboardInterrupt:
        print("\nstopped", flush=True)
        return 0
    except Exception as error:
        if rank:
            time.sleep(FIRST_SPEAKS)  # the first rank prints an error that all share; the launcher then ends the others
        if options.debug or not is_users(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return 1
    finally:
        leave_group()


def _serve(demo: Demo, model: Any, line: str, options: argparse.Namespace) -> int:
    page = Page(demo, model, line, options.max_seq_len)
    try:
        url, public = page.launch(options.host, options.port, options.share)
    except OSError as error:  # the port was taken while the model loaded; Gradio's message is about a range of ports
        raise _port_in_use(options.host, options.port) from error
    print(f"{demo.title}: {line}\nOpen {url} (Ctrl-C ends it)", flush=True)
    if options.share:
        print(f"Open to everybody: {public}" if public else "error: no public address was to be had", flush=True)
    broken: threading.Event = getattr(model, "broken", threading.Event())
    try:
        torchrun_is_gone = watch_torchrun()
        while not broken.wait(1):
            if torchrun_is_gone():
                print("error: torchrun is gone", file=sys.stderr, flush=True)
                return 1
        print("error: the ranks are out of step after a failure; start the demo again", file=sys.stderr, flush=True)
        return 1
    finally:
        end_within(GRACE)
        page.close()


def _interrupt(*_: Any) -> None:
    """Raise KeyboardInterrupt at the first signal only: under torchrun, terminal and launcher both send one."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    end_within(GRACE)
    raise KeyboardInterrupt


def _free_port(host: str, port: int) -> int:
    """`port` if it is free, or any free port for 0. InputError otherwise."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InputError(f"--host: {host!r} is not an address of this machine ({error.strerror})") from error
    with socket.socket(family, kind) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(address)
        except PermissionError as error:
            raise InputError(f"--port: {port} needs more rights; take one from 1024 on") from error
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise InputError(f"--host: cannot serve on {host} ({error.strerror})") from error
            raise _port_in_use(host, port) from error
        return s.getsockname()[1]


def _port_in_use(host: str, port: int) -> InputError:
    return InputError(f"--port: {port} on {host} is in use; give another one, or 0 for any that is free")


# --------------------------------------------------------------------------- starting a model


def start_launched(options: argparse.Namespace, serve: Serve) -> int:
    """Start the model on the ranks of torchrun or srun, or in this process alone. The first rank serves the page, the
    others follow it."""
    _use_gpus(options.gpu_ids)
    set_meeting_point(options.master_addr, options.master_port)
    group = join_launched()
    if group is None:
        return _start_alone(options, serve)
    ranks = Ranks.of(group)
    if ranks.rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal signals all ranks; the first one ends the others
    model = MetaModel.from_pretrained(**_loading(options), mp_group=group)
    if ranks.rank:
        model.follow()
        return 0
    with model.lead():
        return serve(model, _line(options, model, ranks.size))


def start_own(options: argparse.Namespace, serve: Serve) -> int:
    """Start the model on `--n_gpus` ranks, which this process starts, and serve the page."""
    if launch_of() is not None:
        raise InputError("this demo starts its ranks itself: run it with python and --n_gpus N, not with torchrun")
    n = 1 if options.n_gpus is None and options.gpu_ids is None else options.n_gpus
    size = _count_ranks(n, options.gpu_ids)
    if size == 1:
        _use_gpus(options.gpu_ids)
        return _start_alone(options, serve)
    from accessory.model.multi_gpu_wrapper import MultiGpuWrapper

    where = {name: getattr(options, name) for name in ("gpu_ids", "master_addr", "master_port")}
    with MultiGpuWrapper(**_loading(options), gpus=size, **where) as wrapper:
        return serve(wrapper, _line(options, wrapper, size))


def _start_alone(options: argparse.Namespace, serve: Serve) -> int:
    model = MetaModel.from_pretrained(**_loading(options))
    return serve(model, _line(options, model, 1))


def _loading(options: argparse.Namespace) -> dict[str, Any]:
    return loading_arguments(options, with_visual="image_transform" in options)


def _use_gpus(ids: list[int] | None) -> None:
    if ids is not None:
        _count_ranks(None, ids)
        use_gpus(ids)


def _count_ranks(n: int | None, ids: list[int] | None) -> int:
    """`count_ranks` before CUDA starts. Asking torch for the number of GPUs would start it."""
    visible = visible_gpus() if ids is not None else None
    shown = len(visible) if visible is not None else None
    return count_ranks(n, ids, shown=shown, n_field="--n_gpus", ids_field="--gpu_ids")


def _line(options: argparse.Namespace, model: Any, ranks: int) -> str:
    """The model in one line: name · implementation · dtype · where it runs."""
    name = Path(options.pretrained_path[-1]).name or str(options.pretrained_path[-1])
    device = f"{torch.cuda.get_device_name()} (CUDA)" if torch.cuda.is_available() else "CPU"
    dtype = str(torch_dtype(options.dtype)).removeprefix("torch.")
    parts = [
        name,
        f"{_implementation(options, model)} implementation",
        dtype,
        device + (f", {ranks} ranks" if ranks > 1 else ""),
    ]
    return " · ".join(parts)


def _implementation(options: argparse.Namespace, model: Any) -> str:
    if (llma := getattr(model, "llma", None)) is not None:
        return llma.implementation
    from accessory.checkpoint.folder import open_checkpoint
    from accessory.checkpoint.hub import resolve
    from accessory.config import LlamaType

    if options.llama_type:
        return LlamaType.parse(options.llama_type).implementation
    return open_checkpoint(
        resolve(options.pretrained_path[-1]), options.llama_config or (), allow_partial=True
    ).llama_type.implementation
