"""One request while it is answered: its token ids, its pages, and how far it is.

Only the standard library is imported here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from accessory.engine.pages import Digest, chain
from accessory.engine.sampling_params import SamplingParams
from accessory.limits import PAGE_SIZE

# stop: by a stop token, or by the caller at a stop text. length: `max_tokens` were written. abort: the caller left.
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class ImageSpan:
    """An image of a prompt: its tokens are `count` positions from `start` on."""

    start: int
    count: int
    content: bytes  # a digest of the pixels and of what was done to them
    pixels: Any  # as the runner's `see` takes them


class Draw(NamedTuple):
    """A token that was drawn, with log-probabilities (natural logarithm) where the request asked for them."""

    token: int
    logprob: float | None = None
    top: dict[int, float] | None = None  # the likeliest tokens


@dataclass(eq=False)
class Sequence:
    """A request's ids, with what was drawn so far, and the pages that hold its keys and values.

    root: the digest of all that its keys and values depend on besides ids and images: weights and adapter.
    mask: called with the answer so far, before each draw; returns the tokens that may be drawn, a bit each, most
    significant first, or None for all. Where it raises, the request ends with that error. Grammars use it.
    """

    ids: list[int]  # prompt, then answer
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    images: Many[ImageSpan] = ()
    adapter: int = -1  # number of a loaded adapter; -1: none
    root: Digest = b""
    mask: Callable[[list[int]], bytes | None] | None = None

    prompt_length: int = field(init=False)
    slot: int | None = field(init=False, default=None)  # while it runs
    told: int | None = field(init=False, default=None)  # pages that the ranks know of; None before its first step
    pages: list[int] = field(init=False, default_factory=list)
    computed: int = field(init=False, default=0)  # tokens whose keys and values a planned step has computed
    pending: int = field(init=False, default=0)  # planned draws that are not known yet
    published: int = field(init=False, default=0)  # its first pages, which others may share
    cached: int = field(init=False, default=0)  # prompt tokens that shared pages had computed already
    put_back: int = field(init=False, default=0)  # times it lost its pages
    finished: FinishReason | None = field(init=False, default=None)
    error: BaseException | None = field(init=False, default=None)
    drawn: deque[Draw] = field(init=False, default_factory=deque)  # not read by its caller yet
    prompt_logprobs: list[Draw | None] = field(init=False, default_factory=list)  # None for image tokens
    _digests: list[Digest] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.ids)

    @property
    def answer_length(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def todo(self) -> int:
        """Tokens that could be computed now: all that is known, or the one that is drawn at this moment."""
        if self.finished or self.answer_length + self.pending >= self.max_tokens:
            return 0
        if self.pending and self.mask is not None:
            return 0
        return len(self.ids) + self.pending - self.computed

    def full_pages(self, first: int = 0) -> Iterator[tuple[int, Digest]]:
        """(number, digest) of each page that the sequence's known tokens fill, from page `first` on."""
        for n in range(first, len(self.ids) // PAGE_SIZE):
            if n == len(self._digests):
                begin, end = n * PAGE_SIZE, (n + 1) * PAGE_SIZE
                seen = (i.content for i in self.images if i.start < end and i.start + i.count > begin)
                self._digests.append(chain(self._digests[-1] if n else self.root, self.ids[begin:end], seen))
            yield n, self._digests[n]
