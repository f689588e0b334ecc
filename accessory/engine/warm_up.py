"""Requests that nobody asked for, so that a GPU meets every kind of step before the first client comes.

A kernel is compiled, and a CUDA graph captured, when a step first needs it: a client would wait for seconds. Which ones
a step needs follows from its tokens, its sequences, and whether these decode, begin or go on. So all of that is tried
first. The requests pass through the engine as any others do, on one rank or several.

No torch is imported here.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from accessory.engine.sampling_params import SamplingParams
from accessory.engine.scheduler import Scheduler
from accessory.engine.sequence import Sequence
from accessory.limits import GRAPH_BUCKETS, GRAPH_DECODES, GRAPH_MOST_TOKENS, GRAPH_PROMPTS, GRAPH_TOKENS, PAGE_SIZE
from accessory.progress import progress_bar

if TYPE_CHECKING:
    from accessory.engine.engine import Engine

# Ways to draw a token, which take different operations: the likeliest, a sort, the best of a few, no ranking, and all
# that may be asked for beside.
DRAWN = (
    SamplingParams(),
    SamplingParams(temperature=1.0, top_p=0.9, seed=0),
    SamplingParams(temperature=1.0, top_k=20, seed=0),
    SamplingParams(temperature=1.0, top_p=1.0, seed=0),
    SamplingParams(temperature=1.0, top_p=0.9, frequency_penalty=0.1, logprobs=5, seed=0),
)
ANSWER = 3  # tokens: the first comes with the prompt, so two are decoded
LONG_ANSWER = 8  # of sequences that are to decode beside others
STEPS_A_WAVE = 3  # tokens of such a sequence, at most, until a prompt that came has been computed
BESIDE = 4  # sequences that decode while prompts come
# Lengths of such prompts: attention splits keys where a page does not hold them all.
PROMPTS_BESIDE = (20, 200)
# Tokens with which a prompt goes on behind a page that is computed. Attention's tiles have 16, 64 or 128 rows, and a
# token takes as many as a key/value head has query heads.
REMAINDERS = (2, 8, 40, 100)
JUDGED = (100, 300)  # tokens of prompts whose log-probabilities are asked for: the head's rows


class Round(NamedTuple):
    """Requests that run together: a wave comes when all of the one before have drawn a token."""

    what: str
    waves: list[list[Sequence]]


def warm_up(engine: Engine, adapters: int = 0, images: Iterable[Sequence] = (), shown: bool = False) -> None:
    """Have the engine compute steps of all kinds once. Nothing stays of them but kernels, graphs and memory.

    adapters: how many stand beside the weights. images: requests with an image, run one by one. shown: with a progress
    bar.
    """
    todo = [*rounds(engine.scheduler, adapters), *(Round("an image", [[sequence]]) for sequence in images)]
    with progress_bar(len(todo), "warming up", shown, unit=" rounds") as bar:
        for what, waves in todo:
            bar.set_postfix_str(what)
            engine.rehearse(*waves)
            bar.update()


def rounds(scheduler: Scheduler, adapters: int) -> list[Round]:
    """All there is to do, for as many sequences and tokens as the scheduler plans and the cache has pages for."""
    if _Requests(scheduler, -1).room < 2:  # not even a prompt of one token and its answer
        return []
    # A step in which a token takes an adapter has kernels and graphs of its own, whichever adapter it is.
    return [
        one
        for adapter in ((-1, 0) if adapters else (-1,))
        for requests in (_Requests(scheduler, adapter),)
        for one in requests.rounds()
    ]


@dataclass
class _Requests:
    """Makes requests with random ids, and rounds of them. adapter: as a `Sequence`'s."""

    scheduler: Scheduler
    adapter: int

    def __post_init__(self) -> None:
        pages, longest = self.scheduler.pool.pages - 1, self.scheduler.longest
        self.tokens = pages * PAGE_SIZE  # that the cache holds
        self.room = self.tokens if longest is None else min(self.tokens, longest)  # a sequence's tokens at most
        self.most = min(self.scheduler.max_running, pages, self.scheduler.max_waiting)  # sequences at once
        self._random, self._of = random.Random(self.adapter), "" if self.adapter < 0 else " with an adapter"

    def rounds(self) -> Iterator[Round]:
        yield from self.prompts()
        yield from self.beside()
        yield from self.decoding()
        yield from self.crowds()
        yield from self.judged()
        yield from self.mixed()
        yield from self.going_on()

    def decoding(self) -> Iterator[Round]:
        """As many sequences as each graph has rows."""
        answer = min(ANSWER, self.room - 1)
        for count in reversed([*(b for b in GRAPH_BUCKETS if b < self.most), self.most]):
            drawn = [DRAWN[n % len(DRAWN)] for n in range(count)]
            requests = [self._request(min(2, self.room - answer), answer, params) for params in drawn]
            yield self._round(f"{count} at once", requests)

    def prompts(self) -> Iterator[Round]:
        """Steps of many sizes, the largest first, because all graphs take their memory from one pool. Then one more.

        Between two limits of kernels or tiles (`limits`, and the tables beside kernels) lies a power of two, or the
        middle of two such. Triton compiles anew for multiples of 16: the number before a power of two is none.
        """
        budget = self.scheduler.budget
        most = min(budget, self._together)
        powers = [2**n for n in range(most.bit_length())]
        between = (power // 2 * 3 for power in powers)
        sizes = {*powers, *between, *(power - 1 for power in powers), *GRAPH_TOKENS, most}
        for tokens in sorted((size for size in sizes if 0 < size <= most), reverse=True):
            yield self._round(f"prompts of {tokens:,} tokens", self._prompts(tokens))
        # What does not fit a step goes on in the next one, within a page and with too many tokens for a graph.
        if (tokens := min(budget + budget // 2 + 50, self._together)) > budget:
            yield self._round(f"prompts of {tokens:,} tokens", self._prompts(tokens))

    def beside(self) -> Iterator[Round]:
        """Prompts of as many tokens as each graph has, beside as many sequences as it has rows of."""
        for decodes in reversed(GRAPH_DECODES):
            count = min(decodes, self.most - 1)
            fit = [t for t in GRAPH_TOKENS if decodes + t <= GRAPH_MOST_TOKENS and t + count * PAGE_SIZE < self.tokens]
            waves = [self._prompts(tokens) for tokens in reversed(fit)]
            if count > 0 and waves:
                long = [self._long(answer=LONG_ANSWER + STEPS_A_WAVE * len(waves)) for _ in range(count)]
                yield self._round(f"prompts beside {count} sequences", long, *waves)

    def crowds(self) -> Iterator[Round]:
        """More prompts than a graph has room for, of as many tokens as one has, and one token less."""
        count = GRAPH_PROMPTS + 1
        for tokens in sorted({t - less for t in GRAPH_TOKENS for less in (0, 1)}, reverse=True):
            if count <= self.most and 2 * count <= tokens <= min(self._together, count * (self.room - 1)):
                short = [self._request(tokens // count + (n < tokens % count), 1) for n in range(count)]
                yield self._round(f"{count} prompts of {tokens} tokens", short)

    def judged(self) -> Iterator[Round]:
        """Prompts of which every token is judged. The head has as many rows."""
        params = SamplingParams(prompt_logprobs=1)
        for tokens in JUDGED:
            yield self._round(f"{tokens} tokens judged", [self._request(min(tokens, self.room - 1), 1, params)])

    def mixed(self) -> Iterator[Round]:
        """Prompts that come while others decode, more than a graph has room for."""
        for tokens in PROMPTS_BESIDE:
            yield self._round(
                f"prompts of {tokens} tokens each beside {BESIDE} sequences",
                [self._long() for _ in range(min(BESIDE, self.most))],
                [self._request(min(tokens, self.room - 1), 1) for _ in range(min(GRAPH_PROMPTS + 1, self.most))],
            )

    def going_on(self) -> Iterator[Round]:
        """Prompts whose first page is computed, one and as many as a step takes, beside the sequence that computed it.

        Few of them are too few programs for a card, so several programs share the keys of each.
        """
        for tokens in REMAINDERS:
            if PAGE_SIZE + tokens + 1 > self.room:
                return
            for count in sorted({1, max(1, min(self.most - 1, self.scheduler.budget // tokens))}):
                page = self._ids(PAGE_SIZE)
                yield self._round(
                    f"{count} × {tokens} tokens behind a page",
                    [self._long(page)],
                    [self._request(tokens, 1, before=page) for _ in range(count)],
                )

    @property
    def _together(self) -> int:
        """The most tokens of prompts that are there at once."""
        return min(self.tokens, self.most * (self.room - 1))

    def _prompts(self, tokens: int) -> list[Sequence]:
        """As few prompts as have so many tokens."""
        count = -(-tokens // (self.room - 1))
        return [self._request(tokens // count + (n < tokens % count), 1) for n in range(count)]

    def _long(self, before: Many[int] = (), answer: int = LONG_ANSWER) -> Sequence:
        """A short prompt with a long answer, as far as there is room."""
        answer = min(answer, self.room - len(before) - 1)
        return self._request(min(2, self.room - len(before) - answer), answer, before=before)

    def _request(self, prompt: int, answer: int, params: SamplingParams = DRAWN[0], before: Many[int] = ()) -> Sequence:
        """prompt: its tokens behind those of `before`."""
        # A root of its own: no page is taken for one of a client's.
        root = f"warm-up {self.adapter}".encode()
        return Sequence([*before, *self._ids(prompt)], params, answer, adapter=self.adapter, root=root)

    def _ids(self, count: int) -> list[int]:
        return [self._random.randrange(self.scheduler.vocab_size or 1) for _ in range(count)]

    def _round(self, what: str, *waves: list[Sequence]) -> Round:
        return Round(what + self._of, list(waves))
