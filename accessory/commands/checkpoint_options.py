"""The options of the commands for whole checkpoints: convert, verify, info, quantize, upcycle, merge, adapter.

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

import argparse

from accessory.model.options import DTYPES, add_json_option, add_option, add_quant_options

LAYOUTS = ("base", "sparse", "hf", "torrent")
GGUF_TYPES = ("f16", "bf16", "q8_0")


def add_convert_arguments(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("src", metavar="SRC", help="the checkpoint to read")
    convert.add_argument("dst", metavar="DST", help="the folder to make; for gguf a folder, or a file FILE.gguf")
    convert.add_argument("--to", required=True, choices=(*LAYOUTS, "gguf"), help="the layout to write")
    about = "of gguf's numbers: f16, bf16 or q8_0 (default: bf16 if the source is, else f16)"
    convert.add_argument("--type", choices=GGUF_TYPES, metavar="TYPE", help=about)
    convert.add_argument("--config", nargs="+", default=[], metavar="FILE", help="JSON files that win over SRC's own")
    _writing_arguments(convert)


def add_verify_arguments(verify: argparse.ArgumentParser) -> None:
    verify.add_argument("a", metavar="A", help="a checkpoint")
    verify.add_argument("b", metavar="B", nargs="?", help="another, in any layout")
    add_json_option(verify)


def add_info_arguments(info: argparse.ArgumentParser) -> None:
    info.add_argument("path", metavar="PATH", help="a checkpoint, complete or not")
    add_json_option(info)


def add_quantize_arguments(quantize: argparse.ArgumentParser) -> None:
    quantize.add_argument("src", metavar="SRC", help="the checkpoint to read")
    quantize.add_argument("dst", metavar="DST", help="the folder to make")
    add_quant_options(quantize, "nf4, nf4-dq, int4, int8 or fp8", required=True)
    add_option(
        quantize,
        "no_quant_search",
        dest="quant_search",
        action="store_false",
        help="int4's scales from a group's ends: quicker, worse",
    )
    quantize.add_argument("--calibrate", metavar="FILE", help="a text that int4's and int8's numbers are to suit")
    add_option(quantize, "calibrate_tokens", type=int, metavar="N", help="of the text (default: 65536)")
    add_option(quantize, "allow_unreached", action="store_true", help="search for experts that the text misses")
    quantize.add_argument("--device", help="that computes (default: cuda where there is one, else cpu)")
    _folder_arguments(quantize)


def add_upcycle_arguments(upcycle: argparse.ArgumentParser) -> None:
    upcycle.add_argument("src", metavar="SRC", help="a Hugging Face folder or a GGUF file")
    upcycle.add_argument("dst", metavar="DST", help="the folder to make")
    upcycle.add_argument("--experts", type=int, default=8, metavar="N", help="experts a layer (default: 8)")
    upcycle.add_argument("--top-k", type=int, default=2, metavar="K", help="experts a token visits (default: 2)")
    upcycle.add_argument(
        "--noise", type=float, default=0.0, metavar="X", help="of each matrix's own deviation (default: 0)"
    )
    upcycle.add_argument("--seed", type=int, default=0, metavar="N", help="of routers and noise (default: 0)")
    upcycle.add_argument("--to", choices=LAYOUTS, default="base", help="the layout to write (default: base)")
    _writing_arguments(upcycle)


def add_merge_arguments(merge: argparse.ArgumentParser) -> None:
    merge.add_argument("paths", metavar="PATH", nargs="+", help="the base model and its adapters, in order")
    merge.add_argument("dst", metavar="DST", help="the folder to make")
    merge.add_argument("--to", choices=LAYOUTS, help="the layout to write (default: the first PATH's)")
    merge.add_argument(
        "--config", nargs="+", default=[], metavar="FILE", help="JSON files that win over the folders' own"
    )
    merge.add_argument(
        "--allow-unchanged", action="store_true", help="accept adapters, or updates, that change nothing"
    )
    merge.add_argument(
        "--allow-other-base", action="store_true", help="accept adapters that say they were trained on another model"
    )
    merge.add_argument("--no-certificate", dest="certificate", action="store_false", help="do not compare the logits")
    merge.add_argument("--device", default="cpu", help="where the logits are computed (default: cpu)")
    _writing_arguments(merge)
    add_json_option(merge)


def add_adapter_arguments(adapter: argparse.ArgumentParser) -> None:
    adapter.add_argument("direction", choices=("export", "import"), help="export: to PEFT's folder; import: from it")
    adapter.add_argument("src", metavar="SRC", help="the adapter to read")
    adapter.add_argument("dst", metavar="DST", help="the folder to make")
    adapter.add_argument("--base", required=True, metavar="PATH", help="the model that the adapter is for")
    adapter.add_argument("--to", choices=LAYOUTS[:2], help="import: the layout to write (default: the base's)")
    adapter.add_argument("--shards", type=int, metavar="N", help="import: files to split it into (default: 1)")
    adapter.add_argument("--safetensors", action="store_true", help="import: instead of .pth")
    adapter.add_argument("--overwrite", action="store_true", help="replace a DST that is not empty")


def _writing_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--shards", type=int, metavar="N", help="files to split it into; not for torrent")
    command.add_argument("--dtype", choices=DTYPES, metavar="TYPE", help="bf16, fp16, fp32; default: the source's")
    command.add_argument("--safetensors", action="store_true", help="instead of .pth, for base and sparse")
    _folder_arguments(command)


def _folder_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace a DST that is not empty")
    command.add_argument("--no-verify", dest="verify", action="store_false", help="do not re-read what was written")
