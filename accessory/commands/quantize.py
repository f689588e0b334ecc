"""`accessory quantize`: writes a quantised copy of a checkpoint, and calibrates it on a text if there is one."""

from __future__ import annotations

import argparse
import sys

from accessory.checkpoint.atomic import check_destination
from accessory.checkpoint.folder import open_checkpoint
from accessory.checkpoint.hub import resolve
from accessory.convert.quantize import quantize_checkpoint
from accessory.data.plain_text import token_rows
from accessory.data.tokenizer import check_vocabulary, tokenizer_of
from accessory.errors import InputError
from accessory.formats import Quant
from accessory.launch.gpus import check_device, default_device
from accessory.planner.fit import explained_on

ROW = 512  # tokens of the text in a row
TOKENS = 128 * ROW


def quantize(options: argparse.Namespace) -> int:
    """Run the command. Prints which experts the text reached, and the folder that was written."""
    device = check_device(options.device) or default_device()
    quant = Quant.parse(options.quant, options.quant_attention, options.quant_output)
    check_destination(options.dst, options.overwrite, [options.src])
    src, calibrate = resolve(options.src), None
    if options.calibrate is not None:
        source = open_checkpoint(src)
        tokenizer = tokenizer_of([source.path])
        check_vocabulary(tokenizer, source.args.vocab_size)
        length, wanted = min(ROW, source.args.max_seq_len), options.calibrate_tokens or TOKENS
        if wanted < length:
            raise InputError(f"--calibrate-tokens: got {wanted}, but it must be at least {length}")
        calibrate = token_rows(options.calibrate, tokenizer, tokens=wanted, length=length)
        if calibrate.numel() < wanted // length * length:
            print(f"{options.calibrate}: has {calibrate.numel()} tokens only", file=sys.stderr)
    elif options.calibrate_tokens is not None or options.allow_unreached:
        which = "--allow-unreached" if options.allow_unreached else "--calibrate-tokens"
        raise InputError(f"{which}: says how to calibrate, but there is no text; give --calibrate FILE")
    with explained_on(device, f"quantising {src} on {device}", _less(options)):
        reached = quantize_checkpoint(
            src,
            options.dst,
            quant,
            overwrite=options.overwrite,
            verify=options.verify,
            search=options.quant_search,
            calibrate=calibrate,
            allow_unreached=options.allow_unreached,
            device=device,
        )
    if reached is not None:
        print("\n".join(reached.lines()))
    print(f"{options.dst}: written" + (", read again and equal" if options.verify else ""))
    return 0


def _less(options: argparse.Namespace) -> str:
    """What needs less memory on the device."""
    without = " fewer --calibrate-tokens or" if options.calibrate is not None else ""
    return f"--device cpu or{without} --no-quant-search needs less there"
