"""`accessory bench` of a card: makes a `Job` of the options, runs it, and writes what came out."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from accessory import __version__
from accessory.bench import figures, kernels, pages, peer_gpt_fast, peer_transformers, roofline
from accessory.bench.card import measure_card
from accessory.bench.figures import Figure
from accessory.bench.job import STORED, Job
from accessory.bench.run import measure
from accessory.checkpoint.folder import Checkpoint, open_checkpoint
from accessory.commands.bench_options import KEPT_OUT, NOT_SHOWN, one_format
from accessory.config import PRESETS, ModelArgs
from accessory.engine.deterministic import check_deterministic
from accessory.errors import InputError
from accessory.formats import Quant
from accessory.launch.gpus import check_device, default_device
from accessory.launch.memory import room_for
from accessory.launch.process_group import join_launched, leave_group
from accessory.limits import MAX_RUNNING_CPU, MAX_RUNNING_GPU
from accessory.model.options import torch_dtype
from accessory.parallel.mesh import Ranks
from accessory.parallel.sharding import check_ranks
from accessory.progress import progress_bar
from accessory.train.metrics import write_whole


def bench(options: argparse.Namespace) -> int:
    """Print a table as its rows come, and write the files that were asked for. Every rank calls it."""
    _check_packages(options)
    checkpoint, args = _network(options)
    device = torch.device(check_device(options.device) or default_device())
    if options.kernels and device.type != "cuda":
        raise InputError("--kernels: it needs a GPU; on a CPU no step is a CUDA graph")
    joined = dist.is_initialized()
    group = join_launched()
    ranks = Ranks.of(group) if group is not None else None
    _check_ranks(options, args, ranks, device)
    _check_size(options, args, ranks, device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if options.deterministic:
        check_deterministic(device, torch_dtype(options.dtype), False, "--deterministic")
    with torch.device("cpu"):
        torch.manual_seed(0)
    job = Job(
        args=args,
        card=measure_card(device, torch_dtype(options.dtype)),
        device=device,
        dtype=torch_dtype(options.dtype),
        checkpoint=checkpoint,
        ranks=ranks,
        implementations=options.implementation or ["sparse"],
        formats=options.format or ["none"],
        batches=options.batch or [1],
        tokens=options.tokens or [1],
        context=options.context or 0,
        prompt=options.prompt or 0,
        requests=options.requests or 0,
        kernels=options.kernels,
        deterministic=options.deterministic or False,
        parts=options.part or [],
        recompute=options.recompute,
        graphs=not options.no_graphs,
        backward=options.backward,
        data_parallel=options.data_parallel or "sdp",
        model_parallel_size=options.model_parallel_size or 1,
        gradient_dtype=torch_dtype(options.gradient_dtype or "fp32"),
        optimizer=options.optimizer or "adamw",
        peers=options.vs,
        gpt_fast=None if options.gpt_fast_path is None else Path(options.gpt_fast_path),
    )
    command = command_line(options, job.size)
    _run(job, options, command)
    if job.first:
        _write(job, options, command)
    if group is not None and not joined:  # its threads would otherwise end with the process, which may abort it
        leave_group()
    return 0


def _run(job: Job, options: argparse.Namespace, command: str) -> None:
    if not job.first:
        measure(job, options.what)
        return
    print(f"{heading(job)}\n\n{figures.row(figures.COLUMNS)}\n|{'---|' * len(figures.COLUMNS)}", flush=True)
    bar = progress_bar(len(job.peers) + len(job.implementations) * len(job.formats), "networks", unit="")
    begun, redrawn = 0, sys.stderr.isatty()

    def begin(name: str) -> None:
        nonlocal begun
        bar.set_description(name, refresh=False)
        bar.update(min(begun, 1))
        begun += 1

    def show(figure: Figure) -> None:
        if redrawn:
            bar.clear()
        print(figures.row(figures.cells(figure, job.figures, job.card)), flush=True)
        if redrawn:
            bar.refresh()

    job.begin, job.show = begin, show
    with bar:
        measure(job, options.what)
    for line in _kernel_tables(job):
        print(line)
    if not job.figures:
        print("nothing was measured", file=sys.stderr)


def heading(job: Job) -> str:
    """Which card, and which network."""
    several = f"{job.size} × " if job.size > 1 else ""
    billions = job.args.parameter_counts()[0] / 1e9
    size = f"{billions:.2f} B" if billions >= 0.1 else f"{billions * 1e3:.2g} M"
    return f"{several}{job.card}; {job.args.n_layers} layers, {size} parameters"


def lines(job: Job) -> list[str]:
    """What a page shows of the run: the card, the table, and the tables of kernels."""
    return [heading(job), "", *figures.table(job.figures, job.card), *_kernel_tables(job)]


def _kernel_tables(job: Job) -> list[str]:
    return [line for title, rows in job.tables.items() for line in ("", f"{title}:", "", *kernels.table(rows))]


def command_line(options: argparse.Namespace, ranks: int = 1) -> str:
    """The command that measures this again: without the options that only say where figures go."""
    words = ["accessory", "bench", options.target, "--what", options.what]
    for name, value in options.given.items():
        if name not in (*KEPT_OUT, *NOT_SHOWN):
            words.append("--" + name.replace("_", "-"))
            if value is not True:
                words += [str(one) for one in (value if isinstance(value, list) else [value])]
    launcher = f"torchrun --nproc-per-node {ranks} -m " if ranks > 1 else ""
    return launcher + " ".join(shlex.quote(word) for word in words)


# --------------------------------------------------------------------------- checks


def _check_packages(options: argparse.Namespace) -> None:
    if options.plot is not None:
        roofline.require_matplotlib()
    if "transformers" in options.vs:
        peer_transformers.require()
    if "gpt-fast" in options.vs:
        peer_gpt_fast.check_folder(Path(options.gpt_fast_path))


def _network(options: argparse.Namespace) -> tuple[Checkpoint | None, ModelArgs]:
    """The checkpoint, None for a preset's sizes with random weights; and the sizes. Formats are checked."""
    name = options.target.lower()
    checkpoint = None
    if name in PRESETS:
        args = PRESETS[name]
        args = args.replace(n_layers=options.layers or args.n_layers)
        options.format, options.implementation = options.format or ["none"], options.implementation or ["sparse"]
    else:
        from accessory.checkpoint.hub import resolve

        checkpoint = open_checkpoint(resolve(options.target))
        args = checkpoint.args
        own = [STORED] if checkpoint.quant is not None else ["none"]
        options.format = options.format or own
        options.implementation = options.implementation or [checkpoint.llama_type.implementation]
        if checkpoint.quant is not None and options.format != own:
            raise InputError(f"--format: the weights of {options.target} are quantised already; leave it out")
    for format in options.format:
        if format != STORED and (quant := Quant.parse(format)) is not None:
            with one_format(format):
                quant.nbytes(args)
    return checkpoint, args


def _check_ranks(options: argparse.Namespace, args: ModelArgs, ranks: Ranks | None, device: torch.device) -> None:
    size = 1 if ranks is None else ranks.size
    if options.what == "allreduce" and size == 1:
        raise InputError(
            "--what allreduce: it needs several ranks; run torchrun --nproc-per-node 2 -m accessory bench "
            f"{options.target} --what allreduce"
        )
    model_parallel = options.model_parallel_size or 1
    if size % model_parallel:
        raise InputError(
            f"--model-parallel-size: got {model_parallel}, but it must divide the number of ranks, {size}; start more "
            "with torchrun"
        )
    if size == 1:
        return
    if options.vs:
        raise InputError(f"--vs: peers are measured on one rank, but there are {size}; run it without torchrun")
    if torch.cuda.is_available() and device.type == "cpu":
        raise InputError("--device: several ranks take the GPUs of this machine; leave it out")
    for implementation in options.implementation:
        check_ranks(args, implementation, model_parallel if options.what == "train" else size)


def _check_size(options: argparse.Namespace, args: ModelArgs, ranks: Ranks | None, device: torch.device) -> None:
    """InputError for more sequences than run at once, and for weights that do not fit this card."""
    most = MAX_RUNNING_CPU if device.type == "cpu" else MAX_RUNNING_GPU
    if options.what == "decode" and max(options.batch) > most:
        if "batch" in options.given:
            raise InputError(f"--batch: got {max(options.batch)}, but {most} sequences run at once on a {device.type}")
        options.batch = [batch for batch in options.batch if batch <= most]
    if options.what not in ("decode", "prefill"):
        return
    room = room_for(device, None if ranks is None else ranks.group)
    theirs = {"none"} if "transformers" in options.vs else set()
    for format in (*options.format, *(theirs - {*options.format})):
        quant = None if format == STORED else Quant.parse(format)
        needed = (quant or Quant()).nbytes(args, torch_dtype(options.dtype).itemsize) / (
            1 if ranks is None else ranks.size
        )
        if format != STORED and room is not None and needed > room.nbytes:
            raise InputError(
                f"--format {format}: a rank's weights take {needed / 1e9:.1f} GB, but {room}; "
                "give fewer --layers, another --format or more ranks"
            )


# --------------------------------------------------------------------------- files


def _write(job: Job, options: argparse.Namespace, command: str) -> None:
    found = job.figures
    if options.out is not None:
        _write_json(Path(options.out), as_json(job, options, command))
    if options.plot is not None:
        roofline.write_plot(Path(options.plot), command, job.card, found)
    if options.readme is not None:
        pages.write_section(Path(options.readme), command, lines(job))
    if options.log is not None:
        card, short = f"{job.size} × {job.card.name}", figures.in_short(found, job.card)
        pages.append_line(Path(options.log), __version__, card, command, short, options.expected or "")
    if options.markdown:
        print("\n" + pages.section(command, lines(job)))


def as_json(job: Job, options: argparse.Namespace, command: str) -> dict[str, Any]:
    return {
        "what": options.what,
        "target": options.target,
        "command": command,
        "version": __version__,
        "ranks": job.size,
        "card": job.card._asdict(),
        "sizes": job.args.to_dict(),
        "dtype": str(job.dtype).removeprefix("torch."),
        "figures": [figures.as_json(figure, job.figures, job.card) for figure in job.figures],
        "kernels": {title: [row._asdict() for row in rows] for title, rows in job.tables.items()},
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with write_whole(path) as file:
        file.write(json.dumps(values, indent=1, ensure_ascii=False).encode())
