"""`accessory finetune`: trains as a configuration says, on one rank or several. `main_finetune.py` uses it too."""

from __future__ import annotations

import argparse
import atexit
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory.checkpoint.hub import is_remote
from accessory.commands.finetune_options import RECIPES, recipes
from accessory.config import PEFT_FIELDS
from accessory.errors import ConfigError, InputError
from accessory.launch.ending import end_with_torchrun, leave
from accessory.launch.environment import Launch, launch_of
from accessory.launch.gpus import count_ranks
from accessory.launch.speaking import no_warnings
from accessory.launch.torchrun import run_under_torchrun
from accessory.train.config import PACKAGE, FinetuneConfig

if TYPE_CHECKING:
    from accessory.train.preparation import Prepared


def finetune(options: argparse.Namespace) -> int:
    """Carry out a recipe: in this process alone, as one of a launcher's ranks, or on `--n-gpus` ranks started here."""
    recipe = find_recipe(options.config)
    config = FinetuneConfig.from_yaml(recipe, options.overrides)
    launch = launch_of()
    if options.n_gpus is None or (options.n_gpus == 1 and launch is None):
        return carry_out(config, dry_run=options.dry_run)
    if launch is not None:
        raise InputError("--n-gpus: this process is one of several that a launcher started; leave it out")
    count_ranks(options.n_gpus, shown=_gpus(config), n_field="--n-gpus")
    words = ["-m", "accessory", "finetune", options.config, *options.overrides, *(["--debug"] if options.debug else [])]
    if options.dry_run:
        status = carry_out(config, dry_run=True, world=options.n_gpus)
        print(f"# to start it yourself: torchrun --nproc-per-node={options.n_gpus} {shlex.join(words)}")
        return status
    with no_warnings():
        _check(config, options.n_gpus)
    return run_under_torchrun(options.n_gpus, words, debug=options.debug)


def _gpus(config: FinetuneConfig) -> int | None:
    """The GPUs that ranks may take; None where they need none."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() and config.device != "cpu" else None


def find_recipe(name: str) -> Path:
    """The path of a recipe: a file, or one of the package's recipes by its name. ConfigError where there is none."""
    for path in (Path(name), PACKAGE / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    raise ConfigError(f"{name}: no such file, and no recipe of that name; there are {', '.join(recipes())}")


def carry_out(config: FinetuneConfig, *, dry_run: bool = False, world: int | None = None) -> int:
    """Train in this process. Returns the exit status.

    world: the number of ranks, by default those that a launcher started. dry_run: do all that a run does before it
    builds its network, write nothing, and print the recipe.
    """
    launch = launch_of()
    if world is None:
        world = launch.size if launch else 1
    if dry_run:
        lines = _dry_run(config, world)
        print(config.as_yaml() + "\n".join(f"# {line}" for line in lines))
        return 0
    config.data_parallel_size(world)
    config.check_files()
    if launch is None:
        _train(config)
    else:
        _train_as_rank(config, launch)
    return 0


def _check(config: FinetuneConfig, world: int) -> Prepared:
    """Check in this process alone what a run on `world` ranks checks before it reads its items, and write nothing."""
    replicas = config.data_parallel_size(world)
    config.check_files()  # before torch is imported

    from accessory.parallel.mesh import DeviceMesh
    from accessory.train.preparation import check_network, prepare

    ready = prepare(config, DeviceMesh(), replicas, write=False)
    check_network(ready)
    return ready


def _dry_run(config: FinetuneConfig, world: int) -> list[str]:
    """Check a run on `world` ranks, and describe it: ranks, steps, data and trained parameters.

    A model that must be downloaded is not opened, and neither are the items, which need its tokenizer.
    """
    replicas = config.data_parallel_size(world)
    rows = config.batch_size * config.accum_iter * replicas
    context = f"{config.context_parallel_size} context-parallel × " if config.context_parallel_size > 1 else ""
    experts = f"; {config.expert_parallel_size} hold the experts together" if config.expert_parallel_size > 1 else ""
    lines = [
        f"{world} rank{'s' * (world > 1)} = {config.model_parallel_size} model-parallel × {context}{replicas} "
        f"data-parallel{experts}",
        f"a step: {rows} rows = {config.batch_size} × {config.accum_iter} × {replicas}, "
        f"at most {rows * config.max_words:,} tokens",
    ]
    if any(is_remote(path) for path in config.pretrained_path):
        config.check_files()

        from accessory.parallel.mesh import DeviceMesh
        from accessory.train.preparation import prepare_without_model

        prepare_without_model(config, DeviceMesh(), write=False)
        return [*lines, "the model and the items are not checked: the model would have to be downloaded"]
    ready = _check(config, world)
    lines += _about_items(ready)
    source = ready.source
    trained = "everything"
    if source.kind.peft:
        peft = {name: getattr(source.args, name) for name in PEFT_FIELDS}
        trained = ", ".join(f"{name} {_shown(value)}" for name, value in peft.items() if value is not None)
    return [*lines, f"llama_type {source.kind}; trained: {trained}", *_about_data(config)]


def _about_items(ready: Prepared) -> list[str]:
    """Encode every item as the run does, but keep nothing on disk."""
    import torch

    from accessory.parallel.mesh import DeviceMesh
    from accessory.train.training_data import open_training_data

    kept_nowhere = replace(ready, config=replace(ready.config, cache_ann_on_disk=False))
    data = open_training_data(kept_nowhere, DeviceMesh(), torch.device("cpu"))
    tokens = int(data.dataset.lengths.sum())
    return [f"{len(data.dataset):,} items, {tokens:,} tokens; {data.schedule.steps:,} steps in all"]


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
        from accessory.launch.process_group import leave_group

        leave_group()
    finally:
        atexit.register(leave, status)
