"""A finetuning run from its recipe to the finished folder: `finetune`."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from accessory.build.network import build, build_tower
from accessory.counts import spell_parameters
from accessory.data.template_names import OWN
from accessory.errors import MissingExtraError
from accessory.launch.gpus import check_device, default_device
from accessory.launch.peers import Peers
from accessory.launch.process_group import join_launched
from accessory.parallel.mesh import DeviceMesh, Ranks, broadcast_object
from accessory.train.config import FinetuneConfig
from accessory.train.export import export
from accessory.train.loop import TrainingLoop
from accessory.train.memory import explained_memory
from accessory.train.passes import GraphedPasses
from accessory.train.preparation import Prepared, prepare
from accessory.train.recorder import open_recorder
from accessory.train.resume import StateSaver
from accessory.train.signals import stop_on_signals
from accessory.train.source import COMPUTE, Source, counts, warn_of_biases
from accessory.train.trainer import LossWeights, Trainer
from accessory.train.training_data import TrainingData, open_training_data

log = logging.getLogger(__name__)

# Ranks wait for the first one to tokenise or to write a checkpoint of a hundred gigabytes.
PATIENCE = timedelta(hours=2)


def finetune(config: FinetuneConfig) -> Path:
    """Run (or resume) a finetune on all ranks that a launcher started; returns the finished checkpoint's folder.

    Raises AccessoryError, one line, for everything that can be wrong with configuration, data, model or folders,
    before the first step. A loss that is not finite ends the run with the items of its batch named and the last good
    state saved. SIGTERM and Ctrl-C save a state and end the run; it is resumed with `resume: auto`.
    """
    mesh, device = _join_ranks(config)
    with _watched(mesh):
        return _finetune(config, mesh, device)


def _finetune(config: FinetuneConfig, mesh: DeviceMesh, device: torch.device) -> Path:
    # Everything is checked, and the model's files are opened. Its weights are not yet read.
    ready = prepare(config, mesh, mesh.replicas)
    folder, start, source = ready.folder, ready.start, ready.source
    if mesh.first:
        warn_of_biases(source)

    # The data are encoded, and all steps laid out.
    data = open_training_data(ready, mesh, device)

    # The network is loaded, which takes long.
    with explained_memory(config, source, device, mesh.size):
        trainer = _build_trainer(config, source, mesh, device)
    start.load_into(trainer)

    # Nothing can be wrong any more. Only now does the run's folder change.
    mesh.from_first(lambda: folder.claim(config, start))
    with stop_on_signals() as stop:
        if mesh.first:
            print("\n".join(filter(None, [_summary(source, trainer, data), start.announcement])))
        identity = {"model": ready.model, "data": data.identity, "rows": ready.split.rows, "steps": data.schedule.steps}
        saver = StateSaver(folder.states, config, trainer, identity, source.kind.implementation, start)
        top_k = source.args.moe.num_experts_per_tok
        with (
            open_recorder(mesh.first, folder.path, config, start, steps=data.schedule.steps, top_k=top_k) as recorder,
            explained_memory(config, source, device, mesh.size),
        ):
            TrainingLoop(config, data, trainer, saver, recorder, start).run(stop)

        # The first process writes while the others wait.
        final = mesh.from_first(lambda: _export(ready))
        if mesh.first:
            _report(ready)
    return final


def _join_ranks(config: FinetuneConfig) -> tuple[DeviceMesh, torch.device]:
    """All ranks of the run, and this rank's device, with the recipe's seed and precision set."""
    device = check_device(config.device, "device") or default_device()
    group = join_launched(PATIENCE)
    ranks = Ranks.of(group) if group is not None else None
    mesh = DeviceMesh.of(
        ranks,
        config.model_parallel_size,
        device.split(":")[0],
        context_parallel_size=config.context_parallel_size,
        expert_parallel_size=config.expert_parallel_size,
    )
    torch.manual_seed(config.seed)
    if config.precision == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    return mesh, torch.device(device)


def _watched(mesh: DeviceMesh) -> AbstractContextManager[None]:
    """Ends this rank where another one is gone: on GPUs it would wait for it until the launcher's patience ends."""
    if mesh.all is None:
        return nullcontext()
    return Peers(mesh.all.rank, mesh.all.size, partial(broadcast_object, ranks=mesh.all)).run()


def _build_trainer(config: FinetuneConfig, source: Source, mesh: DeviceMesh, device: torch.device) -> Trainer:
    dtype = COMPUTE[config.precision]
    decoder = build(source.network, mesh, device=device, dtype=dtype, training=source.training, progress=mesh.first)
    tower = build_tower(source.network, device=device, dtype=dtype, progress=mesh.first) if source.views else None
    weights = LossWeights(source.args.load_balancing_weight, config.z_loss_weight, config.global_batch_statistics)
    trainer = Trainer(
        decoder,
        mesh,
        weights,
        weight_decay=config.weight_decay,
        clip=config.clip_grad,
        tower=tower,
        optimizer=config.optimizer,
        offload=config.offload,
        graphs=source.kind.peft if config.cuda_graphs is None else config.cuda_graphs,
    )
    if config.cuda_graphs and mesh.first and not isinstance(trainer.passes, GraphedPasses):
        log.warning(
            "cuda_graphs: passes run as they are, since CUDA graphs need a GPU, 16 bits, no images, no parameters, "
            "rows or experts that data-parallel ranks share, and for model-parallel ranks the sparse implementation"
        )
    return trainer


def _summary(source: Source, trainer: Trainer, data: TrainingData) -> str:
    trained, total = counts(trainer.decoder)
    split, mesh = data.split, trainer.mesh
    sharing = f" ({mesh.context_size} context-parallel)" if mesh.context_size > 1 else ""
    sharing += f" ({mesh.experts.size} expert-parallel)" if mesh.experts else ""
    return (
        f"{source.kind}: {spell_parameters(trained)} of {spell_parameters(total)} parameters are trained\n"
        f"{len(data.dataset):,} items, {int(data.dataset.lengths.sum()):,} tokens; {data.schedule.steps:,} steps "
        f"of {split.rows} rows = {split.batch_size} a micro-step × {split.accum_iter} × {mesh.replicas} data-parallel"
        f" ({mesh.model_size} model-parallel){sharing}"
    )


def _export(ready: Prepared) -> Path:
    config, source, folder = ready.config, ready.source, ready.folder
    only = config.only_save_trainable
    return export(
        folder.newest_state(),
        folder.final,
        source.checkpoints,
        source.args,
        source.kind.implementation,
        only_trained=only,
        dtype=None if only else COMPUTE[config.precision],
        shards=config.model_parallel_size,
        image_views=source.views,
        tokenizer=Path(config.tokenizer_path) if config.tokenizer_path else None,
        chat_template=None if ready.template is None else ready.template.jinja(ready.tokenizer),
    )


def _report(ready: Prepared) -> None:
    config, source, folder = ready.config, ready.source, ready.folder
    behind = f", to be loaded behind {source.checkpoints[0].path}" if config.only_save_trainable else ""
    print(f"{folder.final}: the finetuned model{behind}")
    if ready.template is not None and ready.template.name != OWN:
        own = ready.tokenizer.chat_template
        before = "" if own in (None, ready.template.jinja(ready.tokenizer)) else "; the tokenizer came with another one"
        print(f"{folder.final}: its chat template is {ready.template.name}, which it was trained with{before}")
    try:
        report = folder.write_report(config)
    except MissingExtraError as error:
        print(error)
    else:
        log.info("%s", report)
        print(f"{report}: what happened")
