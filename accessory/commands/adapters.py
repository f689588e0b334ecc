"""`accessory merge` and `accessory adapter export|import`: merges adapters, and converts them to and from PEFT."""

from __future__ import annotations

import argparse

from accessory.commands.json_output import print_json
from accessory.convert import peft_format
from accessory.convert.merge import merge as merge_folders
from accessory.errors import InputError
from accessory.launch.gpus import check_device
from accessory.planner.fit import explained_on


def merge(options: argparse.Namespace) -> int:
    """Merge adapters into the weights. Print the changes and the certificate."""
    device, less = check_device(options.device) or "cpu", "--no-certificate, or another --device, needs less there"
    with explained_on(device, f"merging into {options.dst}, logits on {device}", less):
        report = merge_folders(
            options.paths,
            options.dst,
            to=options.to,
            shards=options.shards,
            dtype=options.dtype,
            safetensors=options.safetensors,
            overwrite=options.overwrite,
            allow_unchanged=options.allow_unchanged,
            allow_other_base=options.allow_other_base,
            certificate=options.certificate,
            device=device,
            verify=options.verify,
            config_files=options.config,
        )
    if options.json:
        print_json({"written": str(options.dst), "verified": options.verify, **report.to_dict()})
        return 0
    print("\n".join(report.lines()))
    print(f"{options.dst}: written" + (", read again and equal" if options.verify else ""))
    return 0


def adapter(options: argparse.Namespace) -> int:
    """Convert an adapter to or from PEFT's folder, and print its content."""
    if options.direction == "export":
        for name in ("to", "shards", "safetensors"):
            if getattr(options, name):
                raise InputError(f"--{name}: is for import; PEFT's folder has one form")
        lines = peft_format.export_adapter(options.src, options.dst, base=options.base, overwrite=options.overwrite)
    else:
        lines = peft_format.import_adapter(
            options.src,
            options.dst,
            base=options.base,
            to=options.to,
            shards=options.shards,
            safetensors=options.safetensors,
            overwrite=options.overwrite,
        )
    print("\n".join(lines))
    print(f"{options.dst}: written")
    return 0
