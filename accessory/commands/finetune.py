"""`accessory finetune`: trains as a configuration says, on one rank or several. `main_finetune.py` uses it too."""

from __future__ import annotations

import argparse
import atexit
import shlex
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from accessory.config import PEFT_FIELDS
from accessory.errors import ConfigError, InputError
from accessory.launch.ending import end_with_torchrun, leave
from accessory.launch.environment import Launch, launch_of
from accessory.launch.gpus import count_ranks, default_device
from accessory.launch.torchrun import run_under_torchrun
from accessory.train.config import PACKAGE, FinetuneConfig

RECIPES = PACKAGE / "configs" / "finetune"


def finetune(options: argparse.Namespace) -> int:
    """Carry out a recipe: in this process alone, as one of a launcher's ranks, or on `--n-gpus` ranks started here."""
    recipe = find_recipe(options.config)
    config = FinetuneConfig.from_yaml(recipe, options.overrides)
    launch = launch_of()
    if options.n_gpus is None or (options.n_gpus == 1 and launch is None):
        return carry_out(config, dry_run=options.dry_run)
    if launch is not None:
        raise InputError("--n-gpus: this process is one of several that a launcher started; leave it out")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and config.device != "cpu" else None
    count_ranks(options.n_gpus, shown=gpus, n_field="--n-gpus")
    words = ["-m", "accessory", "finetune", options.config, *options.overrides, *(["--debug"] if options.debug else [])]
    if options.dry_run:
        status = carry_out(config, dry_run=True, world=options.n_gpus)
        print(f"# to start it yourself: torchrun --nproc-per-node={options.n_gpus} {shlex.join(words)}")
        return status
    config.data_parallel_size(options.n_gpus)
    config.check_files()
    return run_under_torchrun(options.n_gpus, words, debug=options.debug)


def find_recipe(name: str) -> Path:
    """The path of a recipe: a file, or one of the package's recipes by its name. ConfigError where there is none."""
    for path in (Path(name), PACKAGE / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
    raise ConfigError(f"{name}: no such file, and no recipe of that name; there are {known}")


def carry_out(config: FinetuneConfig, *, dry_run: bool = False, world: int | None = None) -> int:
    """Train in this process. Returns the exit status.

    world: the number of ranks, by default those that a launcher started. dry_run: only check the configuration against
    the files, and print it.
    """
    launch = launch_of()
    if world is None:
        world = launch.size if launch else 1
    replicas = config.data_parallel_size(world)
    config.check_files()
    if dry_run:
        lines = _summary(config, world, replicas)
        print(config.as_yaml() + "\n".join(f"# {line}" for line in lines))
        return 0
    if launch is None:
        _train(config)
    else:
        _train_as_rank(config, launch)
    return 0


def _summary(config: FinetuneConfig, world: int, replicas: int) -> list[str]:
    """Lines about ranks, steps and trained parameters. Opens the model's files, unless they must be downloaded."""
    rows = config.batch_size * config.accum_iter * replicas
    lines = [
        f"{world} rank{'s' * (world > 1)} = {config.model_parallel_size} model-parallel × {replicas} data-parallel",
        f"a step: {rows} rows = {config.batch_size} × {config.accum_iter} × {replicas}, "
        f"at most {rows * config.max_words:,} tokens",
    ]
    if any("://" in path for path in config.pretrained_path):
        return [*lines, "the model is not checked: it would have to be downloaded"]
    from accessory.train.memory import check_memory
    from accessory.train.source import open_source

    source = open_source(config)
    try:
        check_memory(config, source, config.device or default_device(), world=world)
    except InputError as error:  # a dry run may be made on another machine than the run
        lines.append(f"on this machine the run would be refused: {error}")
    trained = "everything"
    if source.kind.peft:
        peft = {name: getattr(source.args, name) for name in PEFT_FIELDS}
        trained = ", ".join(f"{name} {_shown(value)}" for name, value in peft.items() if value is not None)
    return [*lines, f"llama_type {source.kind}; trained: {trained}", *_about_data(config)]


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _about_data(config: FinetuneConfig) -> list[str]:
    words = ["accessory", "data", "check", config.data_config, "--model", config.pretrained_path[0]]
    return [f"to check the data: {shlex.join(words)}"]


# --------------------------------------------------------------------------- ranks


def _train(config: FinetuneConfig) -> None:
    from accessory.train.run import finetune as run

    run(config)


def _train_as_rank(config: FinetuneConfig, launch: Launch) -> None:
    """Train as a launcher's rank. After an error, the process ends without destroying its process groups: other ranks
    may be dead, and then that waits for them or aborts."""
    end_with_torchrun(launch.rank)
    status = 1
    try:
        _train(config)
        status = 0
        if dist.is_initialized():
            dist.destroy_process_group()
    finally:
        atexit.register(leave, status)
