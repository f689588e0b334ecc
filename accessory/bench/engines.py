"""An engine over a network, random requests for it, and the seconds of its steps."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from accessory.engine.engine import Engine
from accessory.engine.executor import Follower, GroupExecutor, LocalExecutor
from accessory.engine.runner import Runner, fitting_pages
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.sequence import Sequence as Request
from accessory.limits import PAGE_SIZE
from accessory.nn.decoder import Decoder
from accessory.parallel.mesh import Ranks


class Decoding(NamedTuple):
    seconds: list[float]  # of each step in which the whole batch decoded
    ready: float  # seconds from the first request to the second token of all


class Step(NamedTuple):
    seconds: float
    running: int  # sequences
    keys: int  # their tokens


def runner_over(
    decoder: Decoder,
    tokens: int,
    *,
    max_seq_len: int = 4096,
    see: Callable[[Sequence[Any]], Any] | None = None,
    ranks: Ranks | None = None,
    deterministic: bool = False,
) -> Runner:
    """A runner whose cache has room for so many tokens, or for as many as there is memory for."""
    pages, vocabulary = -(-tokens // PAGE_SIZE) + 1, decoder.args.vocab_size
    pages = fitting_pages(decoder, pages, ranks)
    return Runner(
        decoder, pages=pages, max_seq_len=max_seq_len, vocab_size=vocabulary, see=see, ranks=ranks,
        deterministic=deterministic,
    )  # fmt: skip


def engine_over(decoder: Decoder, tokens: int, **options: Any) -> Engine:
    """An engine on this process's only rank. options: those of `runner_over`."""
    runner = runner_over(decoder, tokens, **options)
    return Engine.of(LocalExecutor(runner), runner.about)


def with_engine(runner: Runner, ranks: Ranks | None, measure: Callable[[Engine], None]) -> None:
    """Call `measure` on the first rank. The other ranks run its steps until it is done."""
    if ranks is None:
        measure(Engine.of(LocalExecutor(runner), runner.about))
    elif ranks.rank == 0:
        executor = GroupExecutor(runner, ranks)
        try:
            measure(Engine.of(executor, runner.about))
        except Exception as error:
            executor.end_call(error=error)
            raise
        executor.end_call()
    else:
        for _ in Follower(runner, ranks).follow():
            pass


def room_for(batch: int, tokens: int) -> int:
    """The tokens of a cache in which so many requests run at once: one page more each, which must be free."""
    return batch * (-(-tokens // PAGE_SIZE) + 1) * PAGE_SIZE


def random_request(r: random.Random, vocabulary: int, prompt: int, tokens: int) -> Request:
    return Request([r.randrange(3, vocabulary) for _ in range(prompt)], SamplingParams(), max_tokens=tokens)


def decode(engine: Engine, vocabulary: int, batch: int, prompt: int, tokens: int, rounds: int = 2) -> Decoding:
    """Time batches of random requests. The first one warms up; the first and last steps of the others do not count."""
    times: list[float] = []
    ready = 0.0
    counts = engine.scheduler.counts
    for round_ in range(rounds):
        r = random.Random(round_)
        began, first = time.perf_counter(), counts.drawn_tokens
        for _ in range(batch):
            engine.add(random_request(r, vocabulary, prompt, tokens))
        mine: list[float] = []
        last, drawn = began, first
        while engine.step():
            now = time.perf_counter()
            if not ready and counts.drawn_tokens - first >= 2 * batch:
                ready = now - began
            if counts.drawn_tokens - drawn == batch:
                mine.append(now - last)
            last, drawn = now, counts.drawn_tokens
        if round_:
            edge = min(4, (len(mine) - 1) // 2)
            times += mine[edge : len(mine) - edge]
    return Decoding(times, ready)


def prompts(engine: Engine, vocabulary: int, batch: int, prompt: int, rounds: int) -> list[float]:
    """Seconds from a batch of requests to the first token of all, once a round. The first round warms up."""
    times = []
    for round_ in range(rounds + 1):
        r = random.Random(1000 + round_)
        requests = [random_request(r, vocabulary, prompt, 1) for _ in range(batch)]
        began = time.perf_counter()
        for request in requests:
            engine.add(request)
        while engine.step():
            pass
        times.append(time.perf_counter() - began)
    return times[1:]


def serve_all(engine: Engine, requests: Sequence[Request]) -> tuple[float, list[Step]]:
    """Seconds until all requests, which come at once, are answered; and every step."""
    began = last = time.perf_counter()
    steps = []
    for request in requests:
        engine.add(request)
    while engine.step():
        now, running = time.perf_counter(), engine.scheduler.running
        steps.append(Step(now - last, len(running), sum(len(s.ids) for s in running)))
        last = now
    return time.perf_counter() - began, steps
