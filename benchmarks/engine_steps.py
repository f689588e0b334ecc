"""For the other programs here: an engine over a decoder, random requests, and the seconds of its decoding steps."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from accessory.engine.engine import Engine
from accessory.engine.executor import LocalExecutor
from accessory.engine.runner import Runner
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.sequence import Sequence as Request
from accessory.limits import PAGE_SIZE
from accessory.nn.decoder import Decoder
from accessory.parallel.mesh import Ranks


class Decoding(NamedTuple):
    seconds: list[float]  # of each step in which the whole batch decoded
    ready: float  # seconds from the first request to the second token of all
    graph: bool  # whether such steps are replayed as a CUDA graph


def runner_over(
    decoder: Decoder,
    tokens: int,
    *,
    max_seq_len: int = 4096,
    see: Callable[[Sequence[Any]], Any] | None = None,
    ranks: Ranks | None = None,
) -> Runner:
    """A runner whose cache has room for so many tokens."""
    pages, vocabulary = -(-tokens // PAGE_SIZE) + 1, decoder.args.vocab_size
    return Runner(decoder, pages=pages, max_seq_len=max_seq_len, vocab_size=vocabulary, see=see, ranks=ranks)


def engine_over(decoder: Decoder, tokens: int, **options: Any) -> Engine:
    """An engine on this process's only rank. options: those of `runner_over`."""
    runner = runner_over(decoder, tokens, **options)
    return Engine.of(LocalExecutor(runner), runner.about)


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
    executor = engine.executor
    graph = isinstance(executor, LocalExecutor) and executor.runner._graphs.bucket(batch, False) is not None
    return Decoding(times, ready, graph)
