"""Asks the planner whether a run fits the memory of its ranks, before data are encoded and weights loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from accessory.launch.memory import Room, room_for
from accessory.planner.fit import check_fit, check_host, explain, explained
from accessory.planner.moments import check_blocks, offloaded_bytes
from accessory.planner.setup import ParameterBytes, Setup, Training, TrainingKind
from accessory.train.config import FinetuneConfig
from accessory.train.source import COMPUTE, Source


def check_memory(
    config: FinetuneConfig, source: Source, device: torch.device | str, *, world: int = 1, group: Any = None
) -> None:
    """InputError where weights, gradients and moments alone are more than a rank may take, on its GPU or on the host.

    ConfigError where ranks would cut 8-bit moments inside a block. Warns where the whole step probably is more.
    group: that of the run's ranks, which must all call this at once. Without it, the run's `world` ranks are taken to
    share this machine: they need not have been started.
    """
    setup = planned(config, source, device, world)

    def room(where: torch.device | str) -> Room | None:
        found = room_for(where, group)
        return found if found is None or group else found.shared_by(world)

    check_blocks(setup)
    if offloaded_bytes(setup):
        check_host(setup, room("cpu"))
    check_fit(setup, room(device))


@contextmanager
def explained_memory(config: FinetuneConfig, source: Source, device: torch.device | str, world: int) -> Iterator[None]:
    """Say what the run asks for and what would fit where memory runs out inside."""

    def describe() -> str:
        return explain(planned(config, source, device, world), room_for(device, with_own=True))

    with explained(describe):
        yield


def planned(config: FinetuneConfig, source: Source, device: torch.device | str, world: int) -> Setup:
    """What the planner is asked about a run on `world` ranks."""
    dtype, tp = COMPUTE[config.precision], config.model_parallel_size
    kind: TrainingKind = "lora" if source.kind.peft else "full"
    task = Training(
        kind="mm_stage1" if source.args.trainable_mode == "mm_stage1" else kind,
        batch_size=config.batch_size,
        max_words=config.max_words,
        accum_iter=config.accum_iter,
        packing=config.packing,
        checkpointing=config.checkpointing,
        data_parallel=config.data_parallel,
        optimizer=config.optimizer,
        offload=config.offload,
        gradient_dtype=config.gradient_dtype,
        cuda_graphs=config.cuda_graphs,
        parameter=ParameterBytes(copy=0 if dtype == torch.float32 else 2),
    )
    cp, ep = config.context_parallel_size, config.expert_parallel_size
    return source.network.planned(task, tp=tp, dp=world // tp, cp=cp, ep=ep, device=device, dtype=dtype)
