"""What a run checks and opens before its data are encoded and its network is built: `prepare`.

A run, the process that starts its ranks, and a dry run all call it. So they refuse the same things in the same words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accessory.build.network import outline
from accessory.checkpoint.hub import is_remote
from accessory.data.records import read_meta
from accessory.data.template_base import Template
from accessory.data.templates import get_template
from accessory.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from accessory.launch.gpus import check_device, default_device
from accessory.parallel.mesh import DeviceMesh
from accessory.train.config import FinetuneConfig
from accessory.train.dataloader import Split
from accessory.train.loggers import require_loggers
from accessory.train.memory import check_memory
from accessory.train.resume import Start
from accessory.train.run_folder import RunFolder
from accessory.train.source import Source, open_source


@dataclass(frozen=True)
class Prepared:
    """What a run knows before it encodes its data."""

    config: FinetuneConfig
    folder: RunFolder
    start: Start
    source: Source
    model: dict[str, Any]  # what a run that resumes must have in common with this one
    split: Split
    tokenizer: Tokenizer
    template: Template | None  # that the finished folder keeps


def prepare(config: FinetuneConfig, mesh: DeviceMesh, replicas: int, *, write: bool = True) -> Prepared:
    """Check the recipe against files, packages and devices, and open the model's files; no weights are read.

    replicas: how many groups of the run's ranks have rows of their own; they need not have been started. write: make
    the run's folder where it is missing. Raises AccessoryError, one line, for everything that cannot be used.
    """
    folder, start = prepare_without_model(config, mesh, write=write)
    source = open_source(config)
    model = source.identity()
    start.check_model(model)
    start.check_optimizer(config.optimizer)
    world, group = replicas * config.ranks_a_replica, mesh.all and mesh.all.group
    check_memory(config, source, config.device or default_device(), world=world, group=group)
    split = start.split(config.batch_size, config.accum_iter, replicas)
    tokenizer = _open_tokenizer(config, source)
    template = get_template(config.template or "default", tokenizer)
    kept = template if _writes_dialogues(config) else None
    return Prepared(config, folder, start, source, model, split, tokenizer, kept)


def _writes_dialogues(config: FinetuneConfig) -> bool:
    """Whether the run's template is known to write its items. Where all single turns have a prompt of their own, and
    the recipe names no template, nothing says so."""
    if config.template is not None:
        return True
    files = read_meta(config.data_config)
    return config.dialog and not all(f.prompt_type or config.prompt_type or f.preprocess == "caption" for f in files)


def prepare_without_model(config: FinetuneConfig, mesh: DeviceMesh, *, write: bool) -> tuple[RunFolder, Start]:
    """The part of `prepare` that needs no model: its checks are all that can be known before a model is downloaded."""
    check_device(config.device, "device")
    mesh.from_first(lambda: require_loggers(config.loggers))
    if config.optimizer == "adamw_8bit":
        from accessory.train.adamw_8bit import require_8bit  # not imported for fp32 moments

        require_8bit(config.device or default_device())
    for path in filter(None, (config.data_config, config.eval_data)):
        read_meta(path)
    # The folder says where the run begins: at step 0, or at a state.
    folder = RunFolder(Path(config.output_dir))
    return folder, mesh.from_first(lambda: folder.find_start(config, write=write))


def check_network(ready: Prepared) -> None:
    """Compare the model's tensors with the network, as building it does. Encoders that must be fetched are left out.

    Raises CheckpointError for tensors that are missing, extra or misshapen.
    """
    source = ready.source
    outline(source.network, training=source.training)
    if source.views and not any(encoder.path and is_remote(encoder.path) for encoder in source.vision.all):
        from accessory.checkpoint.vision import encoder_tensors  # not imported for text alone

        encoder_tensors(source.vision, {name: t for c in source.checkpoints for name, t in c.vision.items()})


def _open_tokenizer(config: FinetuneConfig, source: Source) -> Tokenizer:
    """The recipe's, else that of the last folder that has one."""
    path: str | Path = source.checkpoints[0].path
    for checkpoint in source.checkpoints[1:]:
        if any(checkpoint.path.glob("tokenizer.*")):
            path = checkpoint.path
    tokenizer = load_tokenizer(config.tokenizer_path or path)
    check_vocabulary(tokenizer, source.args.vocab_size)
    return tokenizer
