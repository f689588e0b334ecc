"""The options of `accessory bench`. Only the standard library is imported here, so that `accessory --help` answers at
once."""

from __future__ import annotations

import argparse
import math
import os
import secrets
from pathlib import Path

from accessory.arguments import check_seed, option_of
from accessory.errors import InputError
from accessory.model.options import add_option

WHAT = ("serve",)
CLIENTS = 4
PAGE = ".html"


def add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("target", metavar="URL", help="a server of OpenAI's API: http://host:port")
    bench.add_argument("--what", choices=WHAT, required=True, help="serve: how quickly a server answers")
    bench.add_argument("--requests", type=int, default=100, metavar="N", help="to send (default: 100)")
    how = bench.add_mutually_exclusive_group()
    how.add_argument("--rate", type=float, metavar="R", help="a second, at random moments: Poisson arrivals")
    about = f"that ask one request after another (default: {CLIENTS})"
    how.add_argument("--clients", type=int, metavar="C", help=about)
    add_option(bench, "prompt_tokens", type=int, default=128, metavar="N", help="of a random prompt (default: 128)")
    add_option(bench, "max_tokens", type=int, default=32, metavar="N", help="of every answer (default: 32)")
    about = "the first N tokens of all prompts are the same (default: 0)"
    add_option(bench, "shared_prefix", type=int, default=0, metavar="N", help=about)
    about = "of prompts and arrivals (default: another each time; a server knows prompts that it was sent before)"
    bench.add_argument("--seed", type=int, metavar="N", help=about)
    bench.add_argument("--model", metavar="NAME", help="which model or adapter (default: the only model)")
    help_ = "it holds the server's key; or the variable ACCESSORY_API_KEY"
    add_option(bench, "api_key_file", metavar="FILE", help=help_)
    bench.add_argument("--out", metavar="FILE", help="JSON: the figures, and every request's")
    bench.add_argument("--plot", metavar="FILE", help=f"curves of the times, as a page of Bokeh's ({PAGE})")


def check_bench_options(options: argparse.Namespace) -> None:
    """Fill in what was left out. InputError for what cannot be, before anything is sent."""
    for name, least in (("requests", 1), ("clients", 1), ("prompt_tokens", 1), ("max_tokens", 1), ("shared_prefix", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"{option_of(name)}: got {value}, but it must be at least {least}")
    if options.rate is not None and not 0 < options.rate < math.inf:
        raise InputError(f"--rate: got {options.rate}, but it must be a number of requests a second above 0")
    if options.shared_prefix >= options.prompt_tokens:
        raise InputError(
            f"--shared-prefix: got {options.shared_prefix}, but it must be less than --prompt-tokens, "
            f"{options.prompt_tokens}: prompts differ at their end"
        )
    if options.seed is not None:
        check_seed(options.seed, "--seed")
    if options.rate is None and options.clients is None:
        options.clients = CLIENTS
    if options.seed is None:
        options.seed = secrets.randbelow(2**31)
    for name in ("out", "plot"):
        _check_file(getattr(options, name), option_of(name))
    if options.plot is not None and Path(options.plot).suffix != PAGE:
        raise InputError(f"--plot: got {options.plot}, but Bokeh draws into a page; name it *{PAGE}")


def _check_file(path: str | None, option: str) -> None:
    if path is None:
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise InputError(f"{option}: {path} cannot be written, since there is no folder {folder}")
    if Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{option}: {path} cannot be written; give a file in a folder of yours")
