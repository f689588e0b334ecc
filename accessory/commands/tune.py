"""`accessory tune`: writes the table of tiles of the card at hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from accessory import __version__
from accessory.bench import tune as tuning
from accessory.config import PRESETS, ModelArgs
from accessory.errors import InputError
from accessory.formats import check_rows
from accessory.launch.threads import cores
from accessory.ops import tiles
from accessory.ops.machine import has_triton, triton_lacks
from accessory.progress import progress_bar
from accessory.train.metrics import write_whole


def tune(options: argparse.Namespace) -> int:
    """What was measured before for other formats stays in the file."""
    args = PRESETS[options.sizes]
    out = Path(options.out) if options.out is not None else None
    if out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"--out: {out} cannot be written, since there is no folder {out.absolute().parent}")
    if (few := min(options.rows or [1])) <= 0:
        raise InputError(f"--rows: got {few}, but it must be above 0")
    for format in options.format:
        if format != tuning.DENSE:
            check_rows(f"--format {format}", format, min(args.dim, args.hidden_dim))
    if not torch.cuda.is_available():
        raise InputError("accessory tune: it times a GPU's kernels, and torch sees no GPU here")
    if not has_triton():
        raise InputError(f"accessory tune: the kernels need Triton, which lacks {triton_lacks() or 'being installed'}")
    device = torch.device("cuda", torch.cuda.current_device())
    card = torch.cuda.get_device_name(device)
    if out is None:
        out = tiles.cache_folder() / tiles.file_name(card)
        out.parent.mkdir(parents=True, exist_ok=True)
    return run(options, card, device, out, processes=_processes(args))


def _processes(args: ModelArgs) -> int:
    """As many as there are cores, and as there is memory of the card for: each quantises a weight."""
    weight = 2 * args.moe.num_experts * args.dim * args.hidden_dim  # bytes in 16 bits
    return max(1, min(cores(), torch.cuda.mem_get_info()[0] // (3 * weight + 2**30) - 2))


def run(
    options: argparse.Namespace,
    card: str,
    device: torch.device,
    out: Path,
    families: tuple[tuning.Family, ...] = tuning.FAMILIES,
    processes: int = 1,
) -> int:
    """processes: how many compile before anything is timed. With one, kernels are compiled as they are timed."""
    args, rows = PRESETS[options.sizes], options.rows or tuning.ROWS
    kept = json.loads(out.read_text(encoding="utf-8"))["tiles"] if out.exists() and tiles.read(out) else []
    old = {tiles.Key(*(row[n] for n in tiles.Key._fields)): (row["tile"], row["us"]) for row in kept}
    refused: list[tuning.Compiling] = []
    if processes > 1:
        compiling = tuning.to_compile(args, options.format, rows, families)
        with progress_bar(len(compiling), "compiling", unit=" kernels") as bar:
            for count, bad in tuning.compile_ahead(compiling, device, processes):
                refused += bad
                bar.update(count)
    bar = progress_bar(tuning.count(options.format, rows, families), "tiles", unit=" products")
    about = {"sizes": options.sizes, "version": __version__, "torch": torch.__version__}
    print(
        "| family | format | shape | rows an expert | µs | now, µs | tile |\n|---|---|---|---|---|---|---|", flush=True
    )
    with bar:
        timed = tuning.tune(
            args, options.format, device, rows=rows, families=families, refused=refused, begin=bar.set_description
        )
        for found in timed:
            old[found.key] = (found.tile, found.us)
            print(
                f"| {' | '.join(map(str, found.key))} | {found.us:.1f} | {found.now:.1f} | {found.tile} |", flush=True
            )
            # After each, so that a run that is ended loses nothing.
            table = tiles.as_json(card, [(key, tile, us) for key, (tile, us) in sorted(old.items())], **about)
            with write_whole(out) as file:
                file.write(json.dumps(table, indent=1).encode())
            bar.update()
    print(f"{out}: written")
    return 0
