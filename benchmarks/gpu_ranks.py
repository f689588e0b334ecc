"""Measures Mixtral-8x7B's real size on all GPUs of a host, one `accessory bench` after another under torchrun.

    python benchmarks/gpu_ranks.py [--gpus 4] [--out FOLDER] [--quick] [--only decode train-full] [--dry-run]

Weights are random. Decoding, prompts, many requests at once, training steps in every division of the GPUs, sums over
ranks. A full step has as many layers as fit by the planner's arithmetic. FOLDER keeps the log and the JSON of each
command, and the table so far, as soon as they are there. A command that fails, or runs into its limit, is a row that
says so. Run again with the same FOLDER, the program leaves out what the same command left there. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accessory.commands.outcome import outcome
from accessory.config import PRESETS, ModelArgs
from accessory.errors import InputError
from accessory.formats import Quant
from accessory.planner.cards import Card, card_of
from accessory.planner.search import fitting
from accessory.planner.setup import Setup, Training
from accessory.progress import progress_bar

HOSTS = (2, 4, 8)
COLUMNS = ("run", "who", "what", "ms", "tokens/s", "times the floor", "times the peer's speed", "peak, GB")
WORDS_OF_A_ROW = 2048
ENDING = 20.0  # seconds that torchrun has to end its ranks


@dataclass(frozen=True)
class Measurement:
    """Options of `accessory bench`, the name of its files, and after how many seconds it is ended."""

    name: str
    options: tuple[str, ...]
    seconds: float = 150

    def command(self, size: str, gpus: int, folder: Path) -> list[str]:
        launcher = ["torchrun", "--standalone", "--nproc-per-node", str(gpus), "-m"]
        return [*launcher, "accessory", "bench", size, *self.options, "--out", str(folder / f"{self.name}.json")]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, choices=HOSTS, help="default: all of this machine")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: a new one, which is named at the end")
    parser.add_argument("--quick", action="store_true", help="less of everything, to try the program out")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="runs whose names begin so")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--size", default="8x7b", choices=PRESETS)
    options = parser.parse_args(words)
    gpus, card = machine(options.gpus)
    chosen = [
        m
        for m in measurements(PRESETS[options.size], gpus, card, options.quick)
        if m.name.startswith(tuple(options.only))
    ]
    if not chosen:
        raise InputError(f"--only: got {' '.join(options.only)}, but no run's name begins so; --dry-run prints all")
    if options.dry_run:
        for one in chosen:
            print(shlex.join(one.command(options.size, gpus, options.out or Path("FOLDER"))))
        return
    folder = options.out or Path(tempfile.mkdtemp(prefix="gpu_ranks-"))
    folder.mkdir(parents=True, exist_ok=True)
    carry_out(chosen, options.size, gpus, folder)


def machine(gpus: int | None) -> tuple[int, Card]:
    """How many GPUs are measured, and what each is. Where there is none, an H100, for --dry-run and CPU ranks."""
    import torch

    count = torch.cuda.device_count()
    if gpus is None and count not in HOSTS:
        raise InputError(f"--gpus: this machine shows {count} GPUs; give one of {', '.join(map(str, HOSTS))}")
    if gpus is not None and 0 < count < gpus:
        raise InputError(f"--gpus: got {gpus}, but this machine shows {count} GPUs")
    gpus = gpus or count
    if not count:
        return gpus, replace(card_of("H100"), count=gpus)
    return gpus, Card(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory, gpus)


# --------------------------------------------------------------------------- what is measured


def measurements(args: ModelArgs, gpus: int, card: Card, quick: bool) -> list[Measurement]:
    """The most telling ones first: a machine may be lent for less time than all of them take."""
    decode, batches = ("--what", "decode"), ("--batch", "1", "16") if quick else ("--batch", "1", "16", "64")
    found = [
        Measurement("decode-sparse", (*decode, "--format", "none", "int8", *batches))
        if quick
        else Measurement("decode-sparse", (*decode, "--format", "none", "int8", "int4", *batches, "--kernels"), 240),
        Measurement("decode-base", (*decode, "--implementation", "base", "--format", "none", *batches)),
        Measurement("prefill", ("--what", "prefill", "--format", "none", "--batch", "1", "4")),
    ]
    if not quick:
        many = (*decode, "--requests", "256", "--format", "none", "int8", "--batch", "1")
        found.append(Measurement("requests", many, 240))
    found.append(Measurement("allreduce", ("--what", "allreduce")))
    found += full_steps(args, gpus, card, quick)
    found += adapter_steps(args, gpus, card)
    found += everything(args, gpus, card)
    return found


def full_steps(args: ModelArgs, gpus: int, card: Card, quick: bool) -> Iterator[Measurement]:
    for tp, mode in divisions(gpus):
        setup = step_of(args, gpus, tp, mode, kind="full", batch_size=2, cuda_graphs=True)
        layers = 2 if quick else most_layers(setup, card)
        name = "-".join(["train-full", *([mode] if tp < gpus else []), f"tp{tp}", f"{layers}-layers"])
        yield Measurement(name, (*train_options(setup, "full"), "--layers", str(layers)))


def adapter_steps(args: ModelArgs, gpus: int, card: Card) -> Iterator[Measurement]:
    """LoRA in bf16 and QLoRA over int4, of all layers, where they fit: by data and by model parallelism."""
    lora = args.replace(lora_rank=16, lora_alpha=16.0, norm_tuning=False)
    for format, tp, mode in (("none", 1, "fsdp"), ("none", gpus, "sdp"), ("int4", 1, "sdp"), ("int4", gpus, "sdp")):
        setup = step_of(lora, gpus, tp, mode, kind="lora", batch_size=1, checkpointing=True)
        setup = replace(setup, quant=Quant.parse(format) or Quant())
        if fitting(setup, card) is None:
            continue
        name = "-".join(
            ["train-qlora" if format != "none" else "train-lora", *([mode] if tp < gpus else []), f"tp{tp}"]
        )
        yield Measurement(name, (*train_options(setup, "lora"), "--format", format))


def everything(args: ModelArgs, gpus: int, card: Card) -> Iterator[Measurement]:
    """All layers in full, with what saves memory, where they fit: 8 cards of 80 GB."""
    savings: Any = {"optimizer": "adamw_8bit", "gradient_dtype": "bf16"}
    setup = step_of(args, gpus, 1, "fsdp", kind="full", batch_size=1, checkpointing=True, **savings)
    if fitting(setup, card) is not None:
        saved = ("--optimizer", "adamw_8bit", "--gradient-dtype", "bf16")
        yield Measurement("train-full-all-layers", (*train_options(setup, "full"), "--no-graphs", *saved), 240)


def divisions(gpus: int) -> Iterator[tuple[int, str]]:
    """(model-parallel ranks, how parameters lie on data-parallel ones)."""
    for tp in (n for n in (1, *HOSTS) if n <= gpus):
        yield from ((tp, mode) for mode in (("sdp", "fsdp") if tp < gpus else ("sdp",)))


def step_of(args: ModelArgs, gpus: int, tp: int, mode: Any, **task: Any) -> Setup:
    task = {"max_words": WORDS_OF_A_ROW, "packing": False, "data_parallel": mode, **task}
    return Setup(args=args, task=Training(**task), tp=tp, dp=gpus // tp)


def train_options(setup: Setup, part: str) -> tuple[str, ...]:
    assert isinstance(setup.task, Training)
    options = ["--what", "train", "--part", part, "--batch", str(setup.task.batch_size)]
    options += ["--data-parallel", setup.task.data_parallel] if setup.dp > 1 else []
    options += ["--model-parallel-size", str(setup.tp)] if setup.tp > 1 else []
    return (*options, *(["--recompute"] if setup.task.checkpointing else []))


def most_layers(setup: Setup, card: Card) -> int:
    """How many layers of the network fit each card; 2 where the planner says that even these do not."""
    counts = range(setup.args.n_layers, 2, -1)
    return next((n for n in counts if fitting(replace(setup, args=setup.args.replace(n_layers=n)), card)), 2)


# --------------------------------------------------------------------------- measuring


def carry_out(chosen: Sequence[Measurement], size: str, gpus: int, folder: Path) -> None:
    table = [row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    print("\n".join(table), flush=True)
    with progress_bar(len(chosen), "measurements", unit="") as bar:
        for one in chosen:
            bar.set_description(one.name)
            rows = measure(one, size, gpus, folder)
            table += rows
            if sys.stderr.isatty():
                bar.clear()
            print("\n".join(rows), flush=True)
            (folder / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
            bar.update()
    print("\n".join(["", f"{folder}: logs and JSON", "", heading(chosen, folder), "", *table]))


def measure(one: Measurement, size: str, gpus: int, folder: Path) -> list[str]:
    """The rows of one command; the last of them says what went wrong."""
    log, words = folder / f"{one.name}.log", one.command(size, gpus, folder)
    shown = f"$ {shlex.join(words)}\n"
    found = folder / f"{one.name}.json"
    if found.exists() and log.exists() and log.read_text(encoding="utf-8").startswith(shown):
        return rows_in(one, log)
    found.unlink(missing_ok=True)  # of another command
    environment = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    with log.open("wb") as out:
        out.write(shown.encode())
        out.flush()
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            status = process.wait(one.seconds)
            wrong = f"ended with {status}: {last_words(log)}" if status else ""
        except subprocess.TimeoutExpired:
            wrong = f"over its limit of {one.seconds:.0f} s"
        finally:
            end(process)
    rows = rows_in(one, log)
    return [*rows, row([one.name, wrong, *["–"] * (len(COLUMNS) - 2)])] if wrong or not rows else rows


def end(process: subprocess.Popen[bytes]) -> None:
    """torchrun ends its ranks when it is asked to."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def rows_in(one: Measurement, log: Path) -> list[str]:
    """The rows that a command has printed, with its name before them. Tables of kernels have other columns."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return [row([one.name, *c]) for c in cells if len(c) == len(COLUMNS) - 1 and c[0] != COLUMNS[1]]


def heading(chosen: Sequence[Measurement], folder: Path) -> str:
    """What the first command says of the cards. Each log has its own."""
    logs = [folder / f"{one.name}.log" for one in chosen]
    lines = [line for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines()]
    return next((line.partition("; torch")[0] for line in lines if " layers, " in line and "; torch" in line), "")


def last_words(log: Path) -> str:
    """The line of the error; else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines[1:] if "error: " in line or "Error: " in line]
    return (told or lines[1:] or ["it said nothing"])[0 if told else -1].replace("|", "/")[:160]


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(outcome(main))
