"""`accessory bench --what train`: the seconds of a training step, ours.

passes: forward and backward on 16-bit weights, without an optimiser. full: a whole step; weights, gradients and AdamW
in fp32 unless options say otherwise, products in 16 bits; its floor adds the bytes that AdamW must move. lora: a whole
step of LoRA (rank 16, attention and experts) over frozen weights, which may be quantised. The balance loss is always
part of it. On several ranks each data-parallel rank has rows of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from accessory.adapt.peft import adapter_specs_for, trainable_rule
from accessory.bench import floors
from accessory.bench.card import free, peak_gb, seconds_of
from accessory.bench.figures import Figure
from accessory.bench.job import Job
from accessory.build.network import TrainingSpec
from accessory.config import Implementation, ModelArgs
from accessory.data.batches import Batch
from accessory.train.trainer import LossWeights, Trainer

RANK = 16
# A parameter: weight, gradient (in fp32) and two moments are read, and all but the gradient written.
MOVED = {"adamw": 28, "adamw_8bit": 16}
ROUNDS, IN_A_ROW = 5, 4  # steps follow one another, as those of a run do


def train(job: Job, implementation: Implementation, format: str) -> None:
    for part in job.parts:
        if part != "lora" and format != "none":
            continue  # quantised weights are frozen
        for batch in job.batches:
            free(job.device)
            make = partial(_ours, job, implementation, format, part, batch)
            add(job, job.who(implementation, format), part, batch, make, format)


def add(
    job: Job,
    who: str,
    part: str,
    batch: int,
    make: Callable[[], Callable[[], Any]],
    format: str = "none",
    *,
    peer: bool = False,
) -> None:
    """Time the step that `make` prepares. A line of the table says what could not be measured."""
    tokens = job.tokens[0]
    figure = Figure(who=who, what=what_of(job, part, batch, tokens, format), format=format, peer=peer)
    try:
        step = make()
        step()
        free(job.device)
        step()  # again, because the second one may record a graph
        seconds = seconds_of(step, job.device, rounds=ROUNDS, warm=1, in_a_row=IN_A_ROW)
    except Exception as error:
        if not peer:
            raise
        job.add(figure.failed(error))
        return
    passes = 2 if part == "lora" else 3  # a frozen weight has no gradient
    operations = passes * floors.prompt_operations(job.args, batch, tokens, every_logit=True) / job.model_parallel_size
    moved = MOVED[job.optimizer] * job.args.parameter_counts()[0] / job.size if part == "full" else 0.0
    learnt = batch * tokens * (job.size // job.model_parallel_size)
    memory = peak_gb(job.device)
    job.add(replace(figure, seconds=seconds, tokens=learnt, operations=operations, moved=moved, peak_gb=memory))


def what_of(job: Job, part: str, batch: int, tokens: int, format: str) -> str:
    name = part if format == "none" else f"qlora over {format}"
    ways: list[str] = [job.data_parallel] if job.size > job.model_parallel_size else []
    ways += [f"tp {job.model_parallel_size}"] if job.model_parallel_size > 1 else []
    ways += ["recomputing"] if job.recompute else []
    ways += [job.optimizer] if job.optimizer != "adamw" and part != "passes" else []
    ways += ["gradients in bf16"] if job.gradient_dtype == torch.bfloat16 else []
    return ", ".join([f"{name}, {batch} × {tokens}", *ways])


def _ours(job: Job, implementation: Implementation, format: str, part: str, batch: int) -> Callable[[], Any]:
    args, lora = job.args, part == "lora"
    if lora:
        args = args.replace(lora_rank=RANK, lora_alpha=float(RANK), norm_tuning=False)
    training = TrainingSpec(
        trainable=trainable_rule(args, lora),
        adapters=adapter_specs_for(args) if lora else {},
        checkpointing=job.recompute,
        data_parallel=job.data_parallel,
        gradient_dtype=job.gradient_dtype,
    )
    decoder = job.build(job.spec(format, implementation, args), training)
    if part == "passes":
        decoder.cast(job.dtype)
    weights = LossWeights(args.load_balancing_weight)
    trainer = Trainer(decoder, job.mesh, weights, clip=2.0, optimizer=job.optimizer, graphs=job.graphs)
    rows = random_batch(args, batch, job.tokens[0])
    if part != "passes":
        return lambda: trainer.step([rows], 1e-5)

    def forward_backward() -> None:
        trainer.optimizer.zero_grad()
        trainer.forward_backward([rows])

    return forward_backward


def random_batch(args: ModelArgs, batch: int, tokens: int) -> Batch:
    tokens_BT = torch.randint(0, args.vocab_size, (batch, tokens))
    labels_BT = torch.cat([tokens_BT[:, 1:], torch.full((batch, 1), -100)], dim=1)
    positions_BT = torch.arange(tokens).expand(batch, tokens).contiguous()
    zeros_BT = torch.zeros(batch, tokens, dtype=torch.int64)
    counted_BT = torch.ones(batch, tokens, dtype=torch.bool)
    return Batch(tokens_BT, labels_BT, positions_BT, zeros_BT, counted_BT, ())
