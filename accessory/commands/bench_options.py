"""The options of `accessory bench` and `tune`.

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

import argparse
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accessory.arguments import check_seed, option_of
from accessory.config import PRESETS
from accessory.errors import ConfigError, InputError
from accessory.formats import FORMATS
from accessory.model.options import DTYPES, add_option

SERVE = "serve"
WHAT = ("decode", "prefill", "layer", "train", "allreduce", SERVE)
PEERS = {"transformers": ("decode", "prefill", "train"), "gpt-fast": ("decode",), "grouped_mm": ("layer",)}
PARTS = ("passes", "full", "lora")
CLIENTS = 4
PAGE, PICTURE = ".html", ".png"

# Options that belong to some measurements only, and what they are where they are left out: by measurement.
_NETWORK = ("decode", "prefill", "layer", "train")
DEFAULTS: dict[str, dict[str, Any]] = {
    "requests": {SERVE: 100, "decode": 0},
    "rate": {SERVE: None},
    "clients": {SERVE: None},
    "prompt_tokens": {SERVE: 128},
    "max_tokens": {SERVE: 32},
    "shared_prefix": {SERVE: 0},
    "seed": {SERVE: None},
    "model": {SERVE: None},
    "api_key_file": {SERVE: None},
    "layers": dict.fromkeys(_NETWORK),
    "implementation": dict.fromkeys(_NETWORK),
    "format": dict.fromkeys(_NETWORK),
    "batch": {"decode": [1, 4, 16, 64], "prefill": [1, 4], "train": [2]},
    "context": {"decode": 128},
    "prompt": {"prefill": 2048},
    "tokens": {"decode": [48], "layer": [1, 4, 8, 16, 64, 256, 512, 2048, 4096, 16384], "train": [2048]},
    "part": {"train": ["lora"]},
    "recompute": {"train": False},
    "no_graphs": {"train": False},
    "backward": {"layer": False},
    "data_parallel": {"train": "sdp"},
    "model_parallel_size": {"train": 1},
    "gradient_dtype": {"train": "fp32"},
    "optimizer": {"train": "adamw"},
    "kernels": {"decode": False},
    "deterministic": {"decode": False, "prefill": False},
    "vs": dict.fromkeys(_NETWORK),
    "gpt_fast_path": {"decode": None},
    "dtype": {what: "bf16" for what in WHAT if what != SERVE},
    "device": {what: None for what in WHAT if what != SERVE},
    "markdown": {what: False for what in WHAT if what != SERVE},
    "readme": {what: None for what in WHAT if what != SERVE},
    "log": {what: None for what in WHAT if what != SERVE},
    "expected": {what: None for what in WHAT if what != SERVE},
}
KEPT_OUT = ("out", "plot", "markdown", "readme", "log", "expected")  # of the command line that pages show
NOT_SHOWN = ("debug", "gpt_fast_path")


def add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    about = "sizes of random weights (8x7b, 8x22b, tiny), a checkpoint, or a server: http://host:port"
    bench.add_argument("target", metavar="8x7b|PATH|URL", help=about)
    about = (
        "decode: steps of a token each; prefill: prompts; layer: a mixture's feed-forward; train: a training step; "
        "allreduce: sums over ranks; serve: how quickly a server answers"
    )
    bench.add_argument("--what", choices=WHAT, required=True, help=about)
    _network_arguments(bench)
    about = "of them at once through the engine, with --what decode; sent to the server (100)"
    bench.add_argument("--requests", type=int, metavar="N", help=about)
    _server_arguments(bench)
    bench.add_argument("--out", metavar="FILE", help="JSON: the figures, and every request's of a server")
    about = f"a roofline ({PICTURE}); of a server, curves of the times, as a page of Bokeh's ({PAGE})"
    bench.add_argument("--plot", metavar="FILE", help=about)
    bench.add_argument("--markdown", action="store_true", default=None, help="print the section that --readme writes")
    bench.add_argument("--readme", metavar="FILE", help="replace the section of this command in it, or add one")
    bench.add_argument("--log", metavar="FILE", help="add a line to it: version, date, card, command, figures")
    bench.add_argument("--expected", metavar="TEXT", help="what the figures were expected to be, for --log")


def add_tune_arguments(tune: argparse.ArgumentParser) -> None:
    every = ("none", *FORMATS)
    about = f"of weights (default: all: {', '.join(every)})"
    tune.add_argument("--format", nargs="+", choices=every, default=list(every), metavar="FORMAT", help=about)
    tune.add_argument("--sizes", choices=PRESETS, default="8x7b", help="whose weights are multiplied (default: 8x7b)")
    tune.add_argument("--rows", type=float, nargs="+", metavar="N", help="an expert (default: 0.25 0.5 1 … 2048)")
    about = "JSON (default: in the user's cache, where the kernels find it; or name it in ACCESSORY_TILES)"
    tune.add_argument("--out", metavar="FILE", help=about)


def _network_arguments(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--layers", type=int, metavar="N", help="of random weights (default: as the sizes have)")
    about = "base, sparse or both (default: PATH's, else sparse)"
    bench.add_argument("--implementation", nargs="+", choices=("base", "sparse"), metavar="NAME", help=about)
    about = f"of weights, several: none, {', '.join(FORMATS)} (default: PATH's, else none)"
    bench.add_argument("--format", nargs="+", choices=("none", *FORMATS), metavar="FORMAT", help=about)
    about = "sequences at once, several (decode: 1 4 16 64; prefill: 1 4; train: 2)"
    bench.add_argument("--batch", type=int, nargs="+", metavar="B", help=about)
    bench.add_argument("--context", type=int, metavar="N", help="decode: tokens before the first one (128)")
    bench.add_argument("--prompt", type=int, metavar="N", help="prefill: tokens of a prompt (2048)")
    about = "decode: of an answer (48); train: of a row (2048); layer: at once, several (1 4 8 … 16384)"
    bench.add_argument("--tokens", type=int, nargs="+", metavar="N", help=about)
    about = "train: passes, full, lora (lora; over a FORMAT it is QLoRA)"
    bench.add_argument("--part", nargs="+", choices=PARTS, metavar="PART", help=about)
    about = "train: compute layers again in backward"
    bench.add_argument("--recompute", action="store_true", default=None, help=about)
    bench.add_argument("--no-graphs", action="store_true", default=None, help="train: passes without CUDA graphs")
    bench.add_argument("--backward", action="store_true", default=None, help="layer: forward and backward")
    about = "train, on several ranks: as in a recipe (default: sdp)"
    bench.add_argument("--data-parallel", choices=("sdp", "fsdp"), help=about)
    about = "train: of trained weights' gradients (default: fp32)"
    bench.add_argument("--gradient-dtype", choices=("fp32", "bf16"), help=about)
    about = "train: adamw, or adamw_8bit: most moments in 8 bits (default: adamw)"
    bench.add_argument("--optimizer", choices=("adamw", "adamw_8bit"), help=about)
    about = "train: ranks that hold the model together (default: 1)"
    bench.add_argument("--model-parallel-size", type=int, metavar="N", help=about)
    about = "decode: the kernels of a step, with the time of each"
    bench.add_argument("--kernels", action="store_true", default=None, help=about)
    about = "decode, prefill: the same again, with bits that depend on no neighbour"
    bench.add_argument("--deterministic", action="store_true", default=None, help=about)
    about = "peers, measured in the same run: transformers, gpt-fast, grouped_mm (of a layer)"
    bench.add_argument("--vs", nargs="+", choices=PEERS, metavar="PEER", help=about)
    add_option(bench, "gpt_fast_path", metavar="FOLDER", help="gpt-fast's mixtral-moe, for --vs gpt-fast")
    bench.add_argument("--dtype", choices=DTYPES, metavar="TYPE", help="bf16 (the default), fp16, fp32")
    bench.add_argument("--device", help="default: cuda where there is one, else cpu")


def _server_arguments(bench: argparse.ArgumentParser) -> None:
    how = bench.add_mutually_exclusive_group()
    how.add_argument("--rate", type=float, metavar="R", help="a second, at random moments: Poisson arrivals")
    about = f"that ask one request after another (default: {CLIENTS})"
    how.add_argument("--clients", type=int, metavar="C", help=about)
    add_option(bench, "prompt_tokens", type=int, metavar="N", help="of a random prompt (default: 128)")
    add_option(bench, "max_tokens", type=int, metavar="N", help="of every answer (default: 32)")
    about = "the first N tokens of all prompts are the same (default: 0)"
    add_option(bench, "shared_prefix", type=int, metavar="N", help=about)
    about = "of prompts and arrivals (default: another each time; a server knows prompts that it was sent before)"
    bench.add_argument("--seed", type=int, metavar="N", help=about)
    bench.add_argument("--model", metavar="NAME", help="which model or adapter (default: the only model)")
    help_ = "it holds the server's key; or the variable ACCESSORY_API_KEY"
    add_option(bench, "api_key_file", metavar="FILE", help=help_)


def check_bench_options(options: argparse.Namespace) -> None:
    """Fill in what was left out, and keep what was given as `options.given`. InputError for what cannot be, before
    torch is imported or anything is sent."""
    shown = (*DEFAULTS, "out", "plot")
    options.given = {name: value for name in shown if (value := getattr(options, name)) is not None}
    served = options.target.startswith(("http://", "https://"))
    if served != (options.what == SERVE):
        what = "a server takes --what serve" if served else "--what serve takes a server, http://host:port"
        raise InputError(f"--what: got {options.what} for {options.target}, but {what}")
    for name, of in DEFAULTS.items():
        if options.what not in of:
            if name in options.given:
                raise InputError(f"{option_of(name)}: it is not for --what {options.what}, but for {', '.join(of)}")
        elif getattr(options, name) is None:
            setattr(options, name, of[options.what])
    for name in ("out", "plot", "readme", "log"):
        _check_file(getattr(options, name), option_of(name))
    if options.what == SERVE:
        _check_serve(options)
    else:
        _check_measures(options)


def _check_measures(options: argparse.Namespace) -> None:
    options.vs = options.vs or []
    for name in ("layers", "batch", "context", "prompt", "tokens", "requests", "model_parallel_size"):
        value = getattr(options, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one < (0 if name == "requests" else 1):
                raise InputError(f"{option_of(name)}: got {one}, but it must be at least 1")
    if options.what in ("decode", "train") and len(options.tokens) > 1:
        raise InputError(f"--tokens: got {len(options.tokens)} numbers, but --what {options.what} takes one")
    if options.what == "decode" and options.tokens[0] < 4:
        raise InputError(
            f"--tokens: got {options.tokens[0]}, but the first and the last step do not count; give 4 or more"
        )
    if options.what == "train" and options.tokens[0] < 2:
        raise InputError("--tokens: got 1, but a row learns from its second token on; give 2 or more")
    for peer in options.vs:
        if options.what not in PEERS[peer]:
            raise InputError(
                f"--vs: {peer} is not measured with --what {options.what}, but with {', '.join(PEERS[peer])}"
            )
    if ("gpt-fast" in options.vs) != (options.gpt_fast_path is not None):
        raise InputError(
            "--vs gpt-fast and --gpt-fast-path FOLDER need each other: the folder is gpt-fast's mixtral-moe"
        )
    if options.expected is not None and options.log is None:
        raise InputError("--expected: it is a part of the line of --log FILE; give that too")
    if options.plot is not None and Path(options.plot).suffix != PICTURE:
        raise InputError(f"--plot: got {options.plot}, but a roofline is a picture; name it *{PICTURE}")
    if options.target.lower() not in PRESETS:
        from accessory.checkpoint.hub import is_remote

        if not is_remote(options.target) and not Path(options.target).exists():
            known = ", ".join(PRESETS)
            raise InputError(f"{options.target}: no such file or folder, none of {known}, and no URL of a server")
        if options.layers is not None:
            raise InputError(f"--layers: {options.target} has its own; they can be chosen of random weights only")


@contextmanager
def one_format(format: str) -> Iterator[None]:
    """Names the option in what is wrong with a format."""
    try:
        yield
    except ConfigError as error:
        raise InputError(f"--format {format}: {error}") from error


def _check_serve(options: argparse.Namespace) -> None:
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
