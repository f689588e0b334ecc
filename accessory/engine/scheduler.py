"""What each step computes: one token of every running sequence, then prompts in chunks, within a budget of tokens.

`plan` gives a step as plain numbers, the same for every rank; `commit` takes what the step drew. The next step may be
planned before a step's draws are known: its entries then say "the slot's last draw".

Only the standard library is imported here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from accessory.engine.pages import PagePool
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.sequence import Draw, FinishReason, Sequence
from accessory.errors import BusyError, InputError, NonFiniteError
from accessory.limits import MAX_WAITING, PAGE_SIZE

NOT_FINITE = "the logits are not finite: broken weights (see `accessory verify`), or fp16 where bf16 is needed"


class Begin(NamedTuple):
    """What a rank must know of a sequence that takes a slot."""

    params: SamplingParams
    prompt: tuple[int, ...]  # for penalties; empty where none needs it
    answer: tuple[int, ...]
    stop_ids: frozenset[int]
    adapter: int
    images: tuple[tuple[int, int, Any], ...]  # (start, count, pixels), of images that are not behind `start` already


class Entry(NamedTuple):
    """One sequence's part of a step."""

    slot: int
    start: int  # position of its first token
    ids: tuple[int, ...] | None  # None: one token, the slot's last draw
    pages: tuple[int, ...]  # that its page table grew by
    draw: int | None  # how many tokens of the answer come before the one that the step draws; None: it draws none
    begin: Begin | None  # in its first step in this slot
    targets: tuple[int, ...] = ()  # where the prompt's log-probabilities are asked for: what follows each token
    mask: bytes | None = None  # tokens that may be drawn, a bit each; None: all
    decodes: bool = False  # whether its token was drawn: it is none of the prompt


class StepPlan(NamedTuple):
    entries: list[Entry]


class StepResult(NamedTuple):
    """draws: of the entries that draw, in their order; None where the logits were not finite. scored: by the entry's
    number, what was asked for of its prompt; None for image tokens."""

    draws: list[Draw | None]
    scored: dict[int, list[Draw | None]]


@dataclass
class Counts:
    """What happened since the start, for metrics."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    drawn_tokens: int = 0
    put_back: int = 0


@dataclass
class Scheduler:
    """pool: the pages. max_running: sequences that run at once. budget: the most tokens of a step. whole: a sequence
    gets the pages of its longest answer at once where there are enough, so that they lie side by side. max_waiting:
    requests that wait at once, besides those that were put back. longest: the most tokens of a sequence, prompt and
    answer together; None where only the pool limits them. vocab_size: tokens that a mask must speak of. deterministic:
    a sequence begins when there are pages for its longest answer, so none is put back; and only pages of prompts are
    shared, because keys made while decoding differ in bits from those of a prompt."""

    pool: PagePool
    max_running: int
    budget: int
    whole: bool = False
    max_waiting: int = MAX_WAITING
    longest: int | None = None
    vocab_size: int | None = None
    deterministic: bool = False
    waiting: deque[Sequence] = field(init=False, default_factory=deque)
    running: list[Sequence] = field(init=False, default_factory=list)  # in the order in which they began
    counts: Counts = field(init=False, default_factory=Counts)

    def __post_init__(self) -> None:
        self._slots = list(range(self.max_running))[::-1]
        self._steps: deque[list[tuple[Sequence, Entry]]] = deque()  # planned, and not committed

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn. Raises as `check_room` does, and BusyError where as many wait as may."""
        self.check_room(sequence)
        self.check_queue(1)
        self.waiting.append(sequence)

    def check_queue(self, more: int) -> None:
        """BusyError where so many more may not wait."""
        if len(self.waiting) + more > self.max_waiting:
            raise BusyError(
                f"busy: {len(self.waiting):,} requests wait already, and {self.max_waiting:,} may; ask again later"
            )

    def check_room(self, sequence: Sequence) -> None:
        """InputError where a sequence is too long for the context or the pool."""
        tokens = sequence.prompt_length + sequence.max_tokens
        asked = f"prompt: {sequence.prompt_length} tokens and an answer of {sequence.max_tokens}"
        if self.longest is not None and tokens > self.longest:
            raise InputError(f"{asked} are {tokens}, but max_seq_len is {self.longest}")
        need, there = _pages(tokens), self.pool.pages - 1
        if need > there:
            raise InputError(f"{asked} need {need} pages of {PAGE_SIZE} tokens, but the cache has {there}")

    def finish(self, sequence: Sequence, reason: FinishReason, error: BaseException | None = None) -> None:
        """End a sequence and give its pages back. Does nothing where it has ended."""
        if sequence.finished:
            return
        # The error comes first: another thread may read it as soon as the sequence has ended.
        sequence.error, sequence.finished = error, reason
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._leave(sequence)

    # ----------------------------------------------------------------- planning

    def plan(self) -> StepPlan | None:
        """The next step, or None where nothing can be computed now."""
        chosen: dict[Sequence, int] = {}  # tokens of each sequence
        for sequence in sorted(self.running, key=lambda s: s.todo > 1):  # decoding first; the sort is stable
            tokens = min(sequence.todo, self.budget - sum(chosen.values()))
            if tokens > 0 and sequence.slot is not None and self._grow(sequence, tokens, chosen):
                chosen[sequence] = tokens
        planned: list[tuple[Sequence, Entry]] = []
        for sequence, tokens in chosen.items():
            self._take(sequence, tokens, planned)
        left, sees = self.budget - sum(chosen.values()), False
        while self.waiting and left > 0 and self._slots:
            sequence = self.waiting[0]
            # One image a step: encoding takes memory and time. A sequence that was put back waits for its last draw.
            if sequence.pending or (sees and sequence.images) or not self._begin(sequence, left):
                break
            tokens = min(sequence.todo, left)
            if self._take(sequence, tokens, planned):
                left -= tokens
                sees = sees or bool(sequence.images)
        if not planned:
            return None
        # Sequences with one token come first: attention computes them together, and a graph consists of such only.
        planned.sort(key=lambda p: p[1].ids is not None and len(p[1].ids) > 1)
        self._steps.append(planned)
        return StepPlan([entry for _, entry in planned])

    def _grow(self, sequence: Sequence, tokens: int, chosen: dict[Sequence, int]) -> bool:
        """Get the pages for so many more tokens. The youngest sequences are put back until there are enough.

        Returns False where the sequence itself was put back.
        """
        need = _pages(sequence.computed + tokens) - len(sequence.pages)
        while need > 0:
            pages = self.pool.take(need, sequence.pages[-1] if sequence.pages else None)
            if pages is not None:
                sequence.pages += pages
                return True
            assert not self.deterministic, "every sequence has all its pages"
            youngest = self.running[-1]
            chosen.pop(youngest, None)
            self._put_back(youngest)
            if youngest is sequence:
                return False
        return True

    def _put_back(self, sequence: Sequence) -> None:
        """Take a sequence's pages and slot. It waits in front of all others and is computed again."""
        self._leave(sequence)
        sequence.computed = 0
        sequence.put_back += 1
        self.counts.put_back += 1
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        sequence.slot, sequence.told, sequence.published = None, None, 0
        self.pool.release(sequence.pages)
        sequence.pages = []

    def _begin(self, sequence: Sequence, left: int) -> bool:
        """Give the first waiting sequence a slot, and pages for its first chunk. False where there are too few."""
        if sequence.params.prompt_logprobs is None:
            # At least one token is computed, because the logits after it are needed.
            most = (len(sequence.ids) - 1) // PAGE_SIZE
            sequence.pages = self.pool.share(d for n, d in sequence.full_pages() if n < most)
        shared = len(sequence.pages)
        first = min(len(sequence.ids) - shared * PAGE_SIZE, left)
        need = _pages(shared * PAGE_SIZE + first) - shared
        longest = _pages(sequence.prompt_length + sequence.max_tokens) - shared
        after = sequence.pages[-1] if sequence.pages else None
        # Where others run, a page for each of them stays free. Otherwise they would put this sequence back at once.
        room = self.pool.free - len(self.running)
        if self.deterministic:
            room, need = self.pool.free, longest
        if (self.running and need > room) or need > self.pool.free:
            self.pool.release(sequence.pages)
            sequence.pages = []
            return False
        pages = self.pool.take(longest if self.whole and longest <= room else need, after)
        assert pages is not None
        sequence.pages += pages
        sequence.computed, sequence.published = shared * PAGE_SIZE, shared
        if not sequence.put_back:
            sequence.cached = sequence.computed
            self.counts.prompt_tokens += sequence.prompt_length
            self.counts.cached_tokens += sequence.computed
        self.waiting.popleft()
        sequence.slot = self._slots.pop()
        self.running.append(sequence)
        return True

    def _take(self, sequence: Sequence, tokens: int, planned: list[tuple[Sequence, Entry]]) -> bool:
        """Plan a sequence's part of the step. Where its mask raises, or is too short, it ends with that error, and this
        returns False."""
        mask, draws = None, sequence.computed + tokens == len(sequence.ids) + sequence.pending
        if draws and sequence.mask is not None:
            try:
                mask = self._whole(sequence.mask(sequence.ids[sequence.prompt_length :]))
            except Exception as error:
                # Without its traceback, whose frames hold the scheduler.
                self.finish(sequence, "error", error.with_traceback(None))
                return False
        planned.append((sequence, self._entry(sequence, tokens, draws, mask)))
        return True

    def _whole(self, mask: bytes | None) -> bytes | None:
        """A mask of just as many bytes as there are tokens to speak of: the masks of a step become one tensor."""
        if mask is None or self.vocab_size is None:
            return mask
        need = -(-self.vocab_size // 8)
        if len(mask) < need:
            raise ValueError(f"a mask has {len(mask)} bytes, but {self.vocab_size:,} tokens take {need}")
        return mask[:need]

    def _entry(self, sequence: Sequence, tokens: int, draws: bool, mask: bytes | None) -> Entry:
        """A sequence's part of the step. From now on its tokens count as computed."""
        assert sequence.slot is not None
        start, known = sequence.computed, len(sequence.ids)
        sequence.computed = end = start + tokens
        draw = sequence.answer_length + sequence.pending if draws else None
        ids = None if start >= known else tuple(sequence.ids[start:end])
        begin = None
        if sequence.told is None:
            params, answer = sequence.params, known - sequence.prompt_length
            begin = Begin(
                params,
                tuple(sequence.ids[: sequence.prompt_length]) if params.counts_tokens else (),
                tuple(sequence.ids[sequence.prompt_length :]) if params.counts_tokens else (),
                sequence.stop_ids if params.min_tokens > answer else frozenset(),
                sequence.adapter,
                tuple((i.start, i.count, i.pixels) for i in sequence.images if i.start + i.count > start),
            )
        pages = tuple(sequence.pages[sequence.told or 0 :])
        sequence.told = len(sequence.pages)
        scored = sequence.params.prompt_logprobs is not None
        targets = tuple(sequence.ids[start + 1 : min(end + 1, sequence.prompt_length)]) if scored else ()
        if draw is not None:
            sequence.pending += 1
        self._publish(sequence)
        return Entry(sequence.slot, start, ids, pages, draw, begin, targets, mask, start >= sequence.prompt_length)

    def _publish(self, sequence: Sequence) -> None:
        """Let other sequences share the pages that are full: this step or an earlier one writes them."""
        end = min(sequence.computed, sequence.prompt_length) if self.deterministic else sequence.computed
        for n, digest in sequence.full_pages(sequence.published):
            if (n + 1) * PAGE_SIZE > end:
                break
            self.pool.publish(sequence.pages[n], digest)
            sequence.published = n + 1

    # ----------------------------------------------------------------- what a step drew

    def commit(self, result: StepResult) -> None:
        """Take the result of the oldest planned step that has not been committed."""
        draws = iter(result.draws)
        for n, (sequence, entry) in enumerate(self._steps.popleft()):
            if n in result.scored:  # some of it is known already where the sequence was put back
                sequence.prompt_logprobs += result.scored[n][len(sequence.prompt_logprobs) - entry.start :]
            if entry.draw is None:
                continue
            draw = next(draws)
            sequence.pending -= 1
            if sequence.finished:  # it ended while this step was under way
                continue
            if draw is None:
                self.finish(sequence, "error", NonFiniteError(NOT_FINITE))
                continue
            sequence.ids.append(draw.token)
            sequence.drawn.append(draw)
            self.counts.drawn_tokens += 1
            if draw.token in sequence.stop_ids and sequence.answer_length > sequence.params.min_tokens:
                self.finish(sequence, "stop")
            elif sequence.answer_length >= sequence.max_tokens:
                self.finish(sequence, "length")
            elif sequence.slot is not None:
                self._publish(sequence)

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences that have ended out of the counts. No page has content afterwards that others could share."""
        for sequence in sequences:
            if sequence.computed or sequence.put_back:  # else it never began, and was not counted
                self.counts.prompt_tokens -= sequence.prompt_length
                self.counts.cached_tokens -= sequence.cached
                self.counts.drawn_tokens -= sequence.answer_length
                self.counts.put_back -= sequence.put_back
        self.pool.forget()

    def fail(self, error: BaseException) -> None:
        """End every sequence with an error: the ranks are gone, and so is what their pages held."""
        self._steps.clear()
        for sequence in [*self.running, *self.waiting]:
            self.finish(sequence, "error", error)
            sequence.pending = 0
        self.pool.forget()


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)
