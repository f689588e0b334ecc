"""Random requests to an engine on a tiny network, and what each of them gets alone."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from accessory.config import Implementation, ModelArgs
from accessory.engine.engine import Engine
from accessory.engine.executor import LocalExecutor
from accessory.engine.pages import PagePool
from accessory.engine.runner import Runner
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.scheduler import Scheduler
from accessory.engine.sequence import Draw
from accessory.engine.sequence import Sequence as Request
from accessory.nn.decoder import Decoder
from helpers.random_models import canonical_from_hf, decoder_from_canonical, hf_mixtral
from helpers.sizes import TINY

ARGS = TINY.replace(vocab_size=97, max_seq_len=320)
PAGES = 65  # of a runner's cache


class Wish(NamedTuple):
    """A request, as often as it is wanted."""

    ids: list[int]
    max_tokens: int = 20
    params: SamplingParams = SamplingParams()
    stop_ids: frozenset[int] = frozenset()

    def request(self) -> Request:
        return Request(list(self.ids), self.params, self.max_tokens, self.stop_ids)


def tiny_decoder(implementation: Implementation, args: ModelArgs = ARGS, std: float = 0.2) -> Decoder:
    return decoder_from_canonical(args, implementation, canonical_from_hf(hf_mixtral(args, std=std))).requires_grad_(
        False
    )


def tiny_runner(decoder: Decoder, **options: Any) -> Runner:
    args = decoder.args
    return Runner(
        decoder, **{"pages": PAGES, "max_seq_len": args.max_seq_len, "vocab_size": args.vocab_size, **options}
    )


def tiny_engine(
    runner: Runner, *, pages: int = PAGES, slots: int = 32, budget: int = 512, ahead: int = 0, whole: bool = True
) -> Engine:
    """An engine over a runner that may have served another one. Its cache holds NaN, which nobody may read."""
    executor = LocalExecutor(runner)
    executor.ahead = ahead
    for pool in (runner.cache.k, runner.cache.v):
        pool.fill_(math.nan)
    return Engine(Scheduler(PagePool(pages), slots, budget, whole=whole), executor)


def answers(engine: Engine, wishes: Sequence[Wish]) -> list[Request]:
    """All wishes at once, answered to their ends."""
    requests = [engine.add(wish.request()) for wish in wishes]
    step_to_the_end(engine)
    assert all(request.finished for request in requests)
    return requests


def step_to_the_end(engine: Engine) -> None:
    while engine.step():
        pass


def written(request: Request) -> list[int]:
    return request.ids[request.prompt_length :]


def random_wishes(r: random.Random, count: int) -> list[Wish]:
    """Requests of all kinds. Many of them begin alike."""
    beginnings = [[1, *(r.randrange(97) for _ in range(length))] for length in (0, 70, 130, 200)]
    wishes = []
    for n in range(count):
        ids = [*r.choice(beginnings), *(r.randrange(97) for _ in range(r.choice((1, 3, 40, 63, 64, 65))))]
        drawn = [
            {},
            {"temperature": 1.0, "seed": n},
            {"temperature": 0.7, "seed": n, "top_k": 5, "top_p": 1.0, "copy": 3},
            {"temperature": 1.5, "seed": n, "top_p": 1.0, "min_p": 0.05},
        ]
        changed = [
            {},
            {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": -0.5},
            {"logit_bias": {5: 3.0, 6: -100}, "min_tokens": 4},
        ]
        asked = [{}, {"logprobs": 2}, {"logprobs": 0, "prompt_logprobs": 1}]
        params = SamplingParams(**r.choice(drawn), **r.choice(changed), **r.choice(asked))
        wishes.append(Wish(ids, r.randint(1, 24), params, frozenset(r.sample(range(97), r.choice((0, 4))))))
    return wishes


def alone(runner: Runner, wishes: Sequence[Wish]) -> list[Request]:
    """Each wish answered by an engine that has nothing else to do and never did."""
    return [answers(tiny_engine(runner), [wish])[0] for wish in wishes]


@dataclass
class Traffic:
    """Wishes that come at random times: one by one and in bursts. Some are given up, some stopped by their caller."""

    engine: Engine
    wishes: Sequence[Wish]
    random: random.Random
    leave: float = 0.03  # how likely someone leaves, each step
    most: int = 60  # requests at once
    open: dict[Request, int] = field(default_factory=dict)

    def run(self, requests: int) -> Iterator[tuple[int, Request]]:
        """Yields (number of the wish, request) of so many requests, each when it has ended."""
        r = self.random
        while requests or self.open:
            if requests and len(self.open) < self.most and r.random() < 0.4:
                for _ in range(min(requests, r.choice((1, 1, 2, 20)))):
                    requests -= 1
                    number = r.randrange(len(self.wishes))
                    self.open[self.engine.add(self.wishes[number].request())] = number
            if self.open and r.random() < self.leave:
                self.engine.finish(r.choice(list(self.open)), stopped=r.random() < 0.5)
            self.engine.step()
            for request in [request for request in self.open if request.finished]:
                yield self.open.pop(request), request


def check_against(request: Request, single: Request) -> None:
    """Check that a request got what it gets alone, or the beginning of that if its caller left."""
    got, want = written(request), written(single)
    if len(got) < len(want):
        assert request.finished in ("abort", "stop")
        want = want[: len(got)]
    else:
        assert request.finished in (single.finished, "abort", "stop")
    assert got == want
    assert [draw.token for draw in request.drawn] == got
    assert all(same_draw(*pair) for pair in zip(request.drawn, single.drawn, strict=False))
    if request.finished == single.finished and len(got) == len(written(single)):
        assert len(request.prompt_logprobs) == len(single.prompt_logprobs)
    assert all(same_draw(*pair) for pair in zip(request.prompt_logprobs, single.prompt_logprobs, strict=False))


def same_draw(ours: Draw | None, theirs: Draw | None, bound: float = 1e-4) -> bool:
    assert ours is not None
    assert theirs is not None
    if ours.token != theirs.token or (ours.logprob is None) != (theirs.logprob is None):
        return False
    if ours.logprob is None or theirs.logprob is None:
        return True
    pairs = [(ours.logprob, theirs.logprob), *zip((ours.top or {}).values(), (theirs.top or {}).values(), strict=True)]
    return all(abs(a - b) <= bound for a, b in pairs)


def check_empty(engine: Engine) -> None:
    """Check that nobody holds a page or a slot."""
    scheduler = engine.scheduler
    assert scheduler.pool.free == scheduler.pool.pages - 1
    assert not any(scheduler.pool._held)
    assert not scheduler.running
    assert not scheduler.waiting
    assert len(scheduler._slots) == scheduler.max_running
    assert not scheduler._steps


def log_softmax_of(oracle: Any, ids: list[int]) -> torch.Tensor:
    """transformers' log-probabilities (T, V) after each token."""
    with torch.no_grad():
        return oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
