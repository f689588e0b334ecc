"""`accessory bench --what decode`: steps of a token for every sequence, and many requests at once."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from accessory.bench import engines, floors
from accessory.bench.card import free, peak_gb
from accessory.bench.figures import Figure
from accessory.bench.job import Job
from accessory.bench.kernels import kernels_of
from accessory.build.network import NetworkSpec
from accessory.config import Implementation
from accessory.engine.engine import Engine

CACHE_OF_REQUESTS = 2**17  # tokens, for `--requests`
WARMING = 96  # requests
PROMPTS_OF_REQUESTS, ANSWERS_OF_REQUESTS = (64, 1024), (32, 512)
NEAR = range(56, 73)  # sequences of the steps whose median is compared with the floor of 64


def decode(job: Job, implementation: Implementation, format: str) -> None:
    spec = job.spec(format, implementation)
    decoder, who = job.build(spec), job.who(implementation, format)
    room = max(engines.room_for(batch, job.context + job.tokens[0]) for batch in job.batches)
    if job.requests:
        room = max(room, CACHE_OF_REQUESTS)
    longest = max(4096, job.context + job.tokens[0])
    for name, deterministic in job.ways(who):
        runner = engines.runner_over(decoder, room, max_seq_len=longest, ranks=job.ranks, deterministic=deterministic)
        engines.with_engine(runner, job.ranks, partial(_measure, job, spec=spec, who=name, format=format))
        for batch in job.batches if job.kernels else ():
            again = runner.again(batch)
            if again is not None:
                job.tables[f"{name}, batch {batch}"] = kernels_of(again, spec.args.n_layers, job.ranks)
        del runner
        free(job.device)
    del decoder
    free(job.device)


def _measure(job: Job, engine: Engine, spec: NetworkSpec, who: str, format: str) -> None:
    args, tokens = spec.args, job.tokens[0]

    def floor(batch: int, context: float) -> dict[str, Any]:
        base, number = spec.implementation == "base", job.dtype.itemsize
        moved = floors.decode_bytes(args, spec.quant, batch, context, ranks=job.size, base=base, number=number)
        return {"nbytes": moved, "operations": floors.decode_operations(args, batch, context) / job.size}

    for batch in job.batches:
        found = engines.decode(engine, args.vocab_size, batch, job.context, tokens)
        if not found.seconds:
            short = f"the cache holds {engine.scheduler.pool.pages} pages, too few for so many sequences at once"
            job.add(Figure(who=who, what=what_of(batch), format=format, note=short))
            continue
        job.add(
            Figure(
                who=who,
                what=what_of(batch),
                format=format,
                seconds=statistics.median(found.seconds),
                tokens=batch,
                peak_gb=peak_gb(job.device),
                **floor(batch, job.context + tokens / 2),
            )
        )
    if job.requests:
        _many(job, engine, who, format, floor)


def what_of(batch: int) -> str:
    return f"decode, batch {batch}"


def _many(job: Job, engine: Engine, who: str, format: str, floor: Callable[[int, float], dict[str, Any]]) -> None:
    """Many requests at once, and the steps among them that had about 64 sequences."""
    r, longest = random.Random(0), engine.scheduler.longest or 4096
    requests = []
    for _ in range(job.requests):
        prompt, answer = r.randint(*PROMPTS_OF_REQUESTS), r.randint(*ANSWERS_OF_REQUESTS)
        requests.append(engines.random_request(r, job.args.vocab_size, min(prompt, longest - answer), answer))
    # Kernels are compiled when steps first have so many rows; here some of them before the clock runs.
    again = [engines.random_request(r, job.args.vocab_size, s.prompt_length, 8) for s in requests[:WARMING]]
    engines.serve_all(engine, again)
    seconds, steps = engines.serve_all(engine, requests)
    asked, answered = sum(s.prompt_length for s in requests), sum(s.answer_length for s in requests)
    what = f"{job.requests} requests of {asked} tokens, {answered} answered"
    job.add(Figure(who=who, what=what, format=format, seconds=seconds, tokens=answered, peak_gb=peak_gb(job.device)))
    near = [step for step in steps if step.running in NEAR]
    if near:
        context = statistics.median(step.keys for step in near) / 64
        job.add(
            Figure(
                who=who,
                what=f"a step with {NEAR[0]} to {NEAR[-1]} running",
                format=format,
                seconds=statistics.median(step.seconds for step in near),
                tokens=64,
                **floor(64, context),
            )
        )
