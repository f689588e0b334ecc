"""`accessory bench --what prefill`: from a batch of prompts to the first token of each, through the engine."""

from __future__ import annotations

import statistics
from functools import partial

from accessory.bench import engines, floors
from accessory.bench.card import free, peak_gb
from accessory.bench.figures import Figure
from accessory.bench.job import Job
from accessory.build.network import NetworkSpec
from accessory.config import Implementation
from accessory.engine.engine import Engine

ROUNDS = 5


def prefill(job: Job, implementation: Implementation, format: str) -> None:
    spec = job.spec(format, implementation)
    decoder, who = job.build(spec), job.who(implementation, format)
    room = engines.room_for(max(job.batches), job.prompt + 1)
    for name, deterministic in job.ways(who):
        runner = engines.runner_over(
            decoder, room, max_seq_len=max(4096, job.prompt + 1), ranks=job.ranks, deterministic=deterministic
        )
        engines.with_engine(runner, job.ranks, partial(_measure, job, spec=spec, who=name, format=format))
        del runner
        free(job.device)
    del decoder
    free(job.device)


def _measure(job: Job, engine: Engine, spec: NetworkSpec, who: str, format: str) -> None:
    for batch in job.batches:
        seconds = statistics.median(engines.prompts(engine, spec.args.vocab_size, batch, job.prompt, ROUNDS))
        job.add(
            Figure(
                who=who,
                what=what_of(batch, job.prompt),
                format=format,
                seconds=seconds,
                tokens=batch * job.prompt,
                operations=floors.prompt_operations(spec.args, batch, job.prompt, every_logit=False) / job.size,
                nbytes=floors.decode_bytes(
                    spec.args, spec.quant, batch * job.prompt, 0, ranks=job.size, number=job.dtype.itemsize
                ),
                peak_gb=peak_gb(job.device),
            )
        )


def what_of(batch: int, prompt: int) -> str:
    return f"prefill, {batch} × {prompt}"
