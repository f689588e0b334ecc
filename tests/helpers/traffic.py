"""Random requests to an engine on a tiny network, and what each of them gets alone."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from accessory.adapt.quant import quantize_skeleton
from accessory.checkpoint.lazy import Constant
from accessory.checkpoint.load import fill
from accessory.checkpoint.names import image_shapes
from accessory.config import Implementation, ModelArgs
from accessory.engine.engine import Engine
from accessory.engine.executor import LocalExecutor
from accessory.engine.pages import PagePool
from accessory.engine.runner import Runner
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.scheduler import Scheduler
from accessory.engine.sequence import Draw, ImageSpan
from accessory.engine.sequence import Sequence as Request
from accessory.formats import Quant
from accessory.nn.decoder import Decoder
from accessory.nn.experts import StackedExperts
from accessory.nn.linear import Linear, RMSNorm
from accessory.nn.vision import Features
from accessory.ops.linear import LinearAdapter
from accessory.vision_config import IMAGE_ID
from helpers.random_models import canonical_from_hf, decoder_from_canonical, hf_mixtral
from helpers.sizes import TINY
from helpers.vision import tiny_clip

ARGS = TINY.replace(vocab_size=97, max_seq_len=320)
PAGES = 65  # of a runner's cache


class Wish(NamedTuple):
    """A request, as often as it is wanted."""

    ids: list[int]
    max_tokens: int = 20
    params: SamplingParams = SamplingParams()
    stop_ids: frozenset[int] = frozenset()
    adapter: int = -1
    images: tuple[ImageSpan, ...] = ()

    def request(self) -> Request:
        root = b"" if self.adapter < 0 else bytes([self.adapter])
        return Request(
            list(self.ids), self.params, self.max_tokens, self.stop_ids, self.images, adapter=self.adapter, root=root
        )


def tiny_decoder(implementation: Implementation, args: ModelArgs = ARGS, std: float = 0.2) -> Decoder:
    return decoder_from_canonical(args, implementation, canonical_from_hf(hf_mixtral(args, std=std))).requires_grad_(
        False
    )


def rich_decoder(kind: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """A network that has everything at once: image tokens, two adapters to choose from, and int8 weights if `kind` is
    that, else an implementation."""
    implementation: Implementation = "base" if kind == "base" else "sparse"
    args = ARGS.replace(vision=tiny_clip())
    tensors = canonical_from_hf(hf_mixtral(args, std=0.2))
    generator = torch.Generator().manual_seed(1)
    tensors |= {name: torch.randn(shape, generator=generator) for name, shape in image_shapes(args).items()}
    decoder = Decoder(args, implementation, sees=True).cast(dtype).compute_in(dtype)
    decoder.eval().requires_grad_(False)
    if kind == "int8":
        quantize_skeleton(decoder, Quant.parse("int8"))
    fill(decoder, {name: Constant(tensor) for name, tensor in tensors.items()})
    stand_random_adapters(decoder, generator)
    return decoder


def stand_random_adapters(decoder: Decoder, generator: torch.Generator) -> None:
    """Two: one of rank 3 beside every linear and expert, one of rank 1 beside some, with biases and norms."""

    device = decoder.tok_embeddings.weight.device

    def part(*shape: int, number: int) -> LinearAdapter:
        *stack, out_features, in_features = shape
        rank = 3 if number == 0 else 1
        a, b, bias = (
            (torch.randn(*stack, *size, generator=generator) * 0.3).to(device)
            for size in ((rank, in_features), (out_features, rank), (out_features,))
        )
        return LinearAdapter(a, b, 0.5 + number, bias if number else None)

    for name, module in decoder.named_modules():
        if isinstance(module, StackedExperts):
            for kind in ("w1", "w2", "w3"):
                shape = tuple(getattr(module, kind).shape)
                module.set_adapters(kind, [part(*shape, number=0), None if kind == "w1" else part(*shape, number=1)])
        elif isinstance(module, Linear):
            shape = tuple(module.weight.shape)
            module.set_adapters([part(*shape, number=0), None if name.endswith("wk") else part(*shape, number=1)])
        elif isinstance(module, RMSNorm):
            weight = 1 + 0.3 * torch.randn(module.weight.shape, generator=generator)
            module.set_adapters([None, weight.to(device)])
    decoder.adapters = 2


def rich_runner(decoder: Decoder, **options: Any) -> Runner:
    """A runner to which an image is its encoders' features."""
    return tiny_runner(decoder, see=lambda pixels: Features(torch.stack(list(pixels)), None), **options)


def random_image(r: random.Random, start: int) -> ImageSpan:
    """One of three images: 5 tokens of 32 channels; with start and end it takes 7 positions."""
    number = r.randrange(3)
    pixels = torch.randn(5, 32, generator=torch.Generator().manual_seed(number))
    return ImageSpan(start, 7, bytes([number]), pixels)


def with_adapters_and_images(r: random.Random, wishes: Sequence[Wish]) -> list[Wish]:
    """Some of the wishes name an adapter, some begin with an image."""
    out = []
    for wish in wishes:
        adapter = r.choice((-1, 0, 1))
        if r.random() < 0.4:
            ids = [wish.ids[0], *[IMAGE_ID] * 7, *wish.ids[1:]]
            wish = wish._replace(ids=ids, images=(random_image(r, 1),))
        out.append(wish._replace(adapter=adapter))
    return out


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
    scheduler = Scheduler(PagePool(pages), slots, budget, whole=whole, deterministic=runner.about.deterministic)
    return Engine(scheduler, executor)


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


def check_against(request: Request, single: Request, bound: float = 1e-4) -> None:
    """Check that a request got what it gets alone, or the beginning of that if its caller left.

    bound: how far log-probabilities may differ.
    """
    got, want = written(request), written(single)
    if len(got) < len(want):
        assert request.finished in ("abort", "stop")
        want = want[: len(got)]
    else:
        assert request.finished in (single.finished, "abort", "stop")
    assert got == want
    assert [draw.token for draw in request.drawn] == got
    assert all(same_draw(*pair, bound) for pair in zip(request.drawn, single.drawn, strict=False))
    if request.finished == single.finished and len(got) == len(written(single)):
        assert len(request.prompt_logprobs) == len(single.prompt_logprobs)
    pairs = zip(request.prompt_logprobs, single.prompt_logprobs, strict=False)
    assert all(same_draw(*pair, bound) for pair in pairs)


def same_draw(ours: Draw | None, theirs: Draw | None, bound: float = 1e-4) -> bool:
    if ours is None or theirs is None:  # image tokens have no log-probability
        return ours is theirs
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
