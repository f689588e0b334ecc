"""The options that choose a model and how it is loaded. The command line and the demos share them.

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

import argparse
from typing import Any

from accessory.arguments import FREE, LARGEST_PORT, check_cache_gb
from accessory.config import SHORT_DTYPES
from accessory.errors import InputError
from accessory.formats import CACHE_DTYPES, FORMATS
from accessory.launch.gpus import check_device

DTYPES = (*SHORT_DTYPES, *SHORT_DTYPES.values())
QUANT = (*FORMATS, "none")
NO_ADAPTER = "none"  # in place of an adapter's name
IMAGE_TRANSFORMS = ("padded_resize", "resized_center_crop")


# --------------------------------------------------------------------------- options of a parser


def add_option(parser: argparse.ArgumentParser, name: str, **how: Any) -> None:
    """Declare `--name`, spelled with dashes or underscores: the original's scripts use --max_seq_len."""
    parser.add_argument(*dict.fromkeys(["--" + name.replace("_", "-"), f"--{name}"]), **how)


def add_json_option(parser: argparse.ArgumentParser, help: str = "print one JSON object") -> None:
    parser.add_argument("--json", action="store_true", help=help)


def add_model_options(parser: argparse.ArgumentParser, *, demo: bool = False, or_url: bool = False) -> None:
    """Declare the options for the checkpoint, for loading it, and for the GPUs.

    or_url: the model may be that of a server instead.
    demo: declare them as the original's demos do. Then the checkpoint is an option, --quant needs no value, the model
    refuses a wrong format instead of the parser, and each demo itself declares the option for the number of its ranks.
    """
    if demo:
        about = "folders, loaded one over the other, or hf://"
        add_option(parser, "pretrained_path", nargs="+", required=True, metavar="PATH", help=about)
    else:
        about = "several are loaded one over the other" + ("; not with --url" if or_url else "")
        parser.add_argument("pretrained_path", nargs="*" if or_url else "+", metavar="PATH", help=about)
    add_option(parser, "llama_type", metavar="TYPE", help="mixtral or mixtral_sparse")
    add_option(parser, "llama_config", nargs="+", metavar="FILE", help="JSON, later ones win")
    add_option(parser, "tokenizer_path", metavar="PATH", help="default: that of PATH")
    about = "tokens of prompt and answer (default: 4096)"
    add_option(parser, "max_seq_len", type=int, default=4096, metavar="N", help=about)
    about = "bf16 (the default), fp16, fp32"
    add_option(parser, "dtype", choices=DTYPES, default="bf16", metavar="TYPE", help=about)
    add_cache_dtype(parser, "those of --dtype")
    about = "memory for keys and values on each rank, or free: most of what is free"
    add_option(parser, "cache_gb", type=cache_size, metavar="GB", help=about)
    about = "an answer's bits do not depend on what runs beside it; slower"
    add_option(parser, "deterministic", action="store_true", help=about)
    if demo:
        about = "while loading: nf4 (alone), nf4-dq, int4, int8, fp8"
        add_option(parser, "quant", nargs="?", const=True, help=about)
        _add_quant_parts(parser)
    else:
        add_quant_options(parser, "nf4, nf4-dq, int4, int8 or fp8, while it is loaded")
        add_option(parser, "device", help="default: cuda where there is one, else cpu")
        about = "ranks that hold the model together; on a CPU, processes"
        add_option(parser, "n_gpus", type=int, metavar="N", help=about)
        about = "an adapter to choose from, by name; may be given several times"
        add_option(parser, "adapter", type=named_folder, action="append", metavar="NAME=PATH", help=about)
    add_option(parser, "gpu_ids", type=int, nargs="+", metavar="ID", help="which GPUs, one a rank")
    about = "where the ranks meet, unless the launcher says it" if demo else "where the ranks of --n-gpus meet"
    add_option(parser, "master_addr", metavar="HOST", help=about)
    about = "the port they meet on, unless the launcher says it" if demo else "default: a free one"
    add_option(parser, "master_port", type=port_number, metavar="PORT", help=about)


def add_quant_options(parser: argparse.ArgumentParser, about: str, *, required: bool = False) -> None:
    """Declare the options for the quantisation format (`about` is the help), and for attention's and the head's."""
    add_option(parser, "quant", choices=QUANT, metavar="FORMAT", required=required, help=about)
    _add_quant_parts(parser, choices=QUANT)


def _add_quant_parts(parser: argparse.ArgumentParser, **how: Any) -> None:
    add_option(parser, "quant_attention", metavar="FORMAT", help="or none", **how)
    add_option(parser, "quant_output", metavar="FORMAT", help="or none: the head", **how)


def add_cache_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    """Declare the option for the numbers of keys and values. default: says in words what they are without it."""
    about = f"fp8: keys and values take half the memory (default: {default})"
    add_option(parser, "cache_dtype", choices=CACHE_DTYPES, metavar="TYPE", help=about)


def add_image_transform(parser: argparse.ArgumentParser) -> None:
    """Declare the option that says how an image becomes the square that encoders take."""
    add_option(
        parser,
        "image_transform",
        choices=IMAGE_TRANSFORMS,
        default=IMAGE_TRANSFORMS[0],
        metavar="NAME",
        help="how an image becomes a square: padded_resize (the default) or resized_center_crop",
    )


def named_folder(text: str) -> tuple[str, str]:
    """Parse the value of an option that names a folder."""
    name, between, path = text.partition("=")
    if not between or not name.strip() or not path:
        raise argparse.ArgumentTypeError(f"got {text!r}, but it must be NAME=PATH")
    return name, path


def port_number(text: str) -> int:
    """Parse the value of an option for a port."""
    if not text.isdigit() or int(text) > LARGEST_PORT:
        raise argparse.ArgumentTypeError(f"got {text!r}, but a port lies in 0 … {LARGEST_PORT}")
    return int(text)


def cache_size(text: str) -> float | str:
    """Parse the value of --cache-gb."""
    try:
        size = text if text == FREE else float(text)
        check_cache_gb(size)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, but it must be a number of GB above 0, or {FREE}") from error
    return size


# --------------------------------------------------------------------------- from options to arguments


def loading_arguments(options: argparse.Namespace, *, with_visual: bool) -> dict[str, Any]:
    """Turn parsed options into the arguments of `MetaModel.from_pretrained`.

    with_visual: load the image encoders too. InputError for a device that does not exist.
    """
    more = ("quant_attention", "quant_output", "cache_dtype", "cache_gb", "deterministic")
    names = ("pretrained_path", "llama_type", "llama_config", "tokenizer_path", "max_seq_len", *more)
    arguments = {name: getattr(options, name) for name in names}
    arguments |= {"quant": options.quant or False, "dtype": torch_dtype(options.dtype), "progress": True}
    if "device" in options:
        arguments["device"] = check_device(options.device)
    if getattr(options, "adapter", None):
        given = [name for name, _ in options.adapter]
        if twice := next((name for name in given if given.count(name) > 1), None):
            raise InputError(f"--adapter: got the name {twice!r} twice; give each folder a name of its own")
        arguments["adapters"] = dict(options.adapter)
    if with_visual:
        arguments |= {"with_visual": True, "image_transform": options.image_transform}
    return arguments


def torch_dtype(given: Any) -> Any:
    """The torch.dtype of a name from `DTYPES`, short or long, or of a torch.dtype among them; None for None."""
    import torch

    if given is None:
        return None
    name = str(given).removeprefix("torch.") if isinstance(given, torch.dtype) else given
    if not isinstance(name, str) or name not in DTYPES:
        raise InputError(f"dtype: got {given!r:.60}, but it must be one of {', '.join(DTYPES)}")
    return getattr(torch, SHORT_DTYPES.get(name, name))
