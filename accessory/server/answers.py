"""The thread that makes the engine's steps, and what it hands to the event loop: pieces of answers.

Handlers of requests run in an event loop, which must never wait for a step. They submit requests and read pieces. A
reader that is slow, or gone, holds up nobody: pieces wait for it, no more of them than its answer may have tokens.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from accessory.engine.engine import Engine
from accessory.engine.sequence import FinishReason
from accessory.errors import RankError
from accessory.model.text_model import TextModel
from accessory.model.writing import Completion, TextRequest, Writing
from accessory.server.metrics import Metrics

log = logging.getLogger(__name__)
# Seconds between requests that come together, at most, and from the first of them to the last.
APART, GATHERING = 0.001, 0.005


class Piece(NamedTuple):
    """What an answer grew by. The tokens may be ahead of the text: half a character, or the beginning of a stop."""

    text: str
    tokens: range  # their numbers in the answer
    finish_reason: FinishReason | None


@dataclass(eq=False)
class Answer:
    """A request's answer on its way to one reader in the event loop."""

    writing: Writing
    loop: asyncio.AbstractEventLoop
    since: float = field(default_factory=time.monotonic)
    first: float | None = None  # when its first token came
    last: float | None = None  # when its last token came
    _pieces: deque[Piece] = field(default_factory=deque)
    _grown: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def completion(self) -> Completion:
        return self.writing.answer

    def put(self, piece: Piece) -> None:
        """From the engine's thread. Its reader hears of it by `wake_readers`."""
        self._pieces.append(piece)

    @property
    def has_pieces(self) -> bool:
        return bool(self._pieces)

    def wake(self) -> None:
        """From the event loop."""
        self._grown.set()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces until the answer has ended. Raises the error that it ended with."""
        while True:
            await self._grown.wait()
            self._grown.clear()
            while self._pieces:
                piece = self._pieces.popleft()
                if piece.finish_reason is not None:
                    self.completion.raise_error()
                yield piece
                if piece.finish_reason is not None:
                    return

    async def whole(self) -> Completion:
        """Wait for its end. Raises the error that it ended with."""
        async for _ in self.pieces():
            pass
        return self.completion


def wake_readers(answers: Sequence[Answer]) -> None:
    """Tell the readers of answers that have grown. From the engine's thread.

    Each event loop is called once for all of a step's answers: every call wakes it, and the two threads would take
    turns with Python's lock for each token.
    """
    grown: dict[asyncio.AbstractEventLoop, list[Answer]] = {}
    for answer in answers:
        grown.setdefault(answer.loop, []).append(answer)
    for loop, its_answers in grown.items():
        try:
            loop.call_soon_threadsafe(_wake_all, its_answers)
        except RuntimeError:  # the loop is closed: nobody reads any more
            log.debug("an answer's reader is gone")


def _wake_all(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.wake()


async def merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Answer, Piece]]:
    """The pieces of several answers as they come, with each answer's number. Raises the first error."""
    if len(answers) == 1:
        async for piece in answers[0].pieces():
            yield 0, answers[0], piece
        return
    queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

    async def read(number: int) -> None:
        try:
            async for piece in answers[number].pieces():
                queue.put_nowait((number, piece))
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(read(number)) for number in range(len(answers))]
    try:
        left = len(tasks)
        while left:
            number, came = await queue.get()
            if came is None:
                left -= 1
            elif isinstance(came, BaseException):
                raise came
            else:
                yield number, answers[number], came
    finally:
        for task in tasks:
            task.cancel()


class EngineThread:
    """Makes steps while there are answers to write. `failure` is what is wrong with the ranks, None while they run."""

    def __init__(self, model: TextModel, metrics: Metrics) -> None:
        self.model, self.metrics = model, metrics
        self.engine: Engine = model.engine()
        self.failure: str | None = None
        self._open: dict[Answer, None] = {}
        self._left: list[Answer] = []  # that nobody reads any more
        self._awake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[TextRequest], loop: asyncio.AbstractEventLoop) -> list[Answer]:
        """Let requests wait for their turn, all or none. Reads images and encodes text, so no event loop may call it.

        Raises InputError for what cannot be answered, and BusyError where the queue is full.
        """
        answers = [Answer(self.model.writing(request), loop) for request in requests]
        self.engine.add_all([answer.writing.request for answer in answers])
        with self._awake:
            self._open.update(dict.fromkeys(answers))
            self._awake.notify()
        return answers

    def leave(self, answers: Sequence[Answer]) -> None:
        """Nobody reads these any more. Their pages are free before the next step: the thread tells the engine then."""
        with self._awake:
            self._left += answers
            self._awake.notify()

    def close(self) -> None:
        """End what is open, and the thread."""
        with self._awake:
            self._closing = True
            self._left += self._open
            self._awake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._awake:
                if not (self._open or self._left or self._closing):
                    self._wait()
                if self._closing and not self._open:
                    return
                answers, left, self._left = list(self._open), self._left, []
            for answer in left:
                self.engine.finish(answer.writing.request)
            if not answers:
                continue
            try:
                self.engine.advance([answer.writing.request for answer in answers])
            except Exception as error:  # all requests have ended with it
                self._note_failure(error)
            ended = [answer for answer in answers if self._handed_on(answer)]
            wake_readers([answer for answer in answers if answer.has_pieces])
            with self._awake:
                for answer in ended:
                    del self._open[answer]
            if self.failure is not None:  # after the readers have heard of it, because ranks take long to load
                self._recover()

    def _wait(self) -> None:
        """Until there is something to do, and requests that come together are all there.

        The first of them would have a step of its own, and the others would wait until it ends.
        """
        while not (self._open or self._left or self._closing):
            self._awake.wait()
        since, there = time.monotonic(), 0
        while there < len(self._open) and time.monotonic() - since < GATHERING:
            there = len(self._open)
            self._awake.wait(APART)

    def _handed_on(self, answer: Answer) -> bool:
        """As `_hand_on`. An error in one answer's text ends this answer, and no other."""
        try:
            return self._hand_on(answer)
        except Exception as error:
            log.exception("an answer failed")
            self.engine.finish(answer.writing.request)
            answer.completion.error, answer.completion.finish_reason = error, "error"
            answer.put(Piece("", range(0), "error"))
            return True

    def _hand_on(self, answer: Answer) -> bool:
        """Give an answer's reader what is new. Returns whether it has ended."""
        request, completion = answer.writing.request, answer.completion
        if not (request.drawn or request.finished):
            return False
        before = len(completion.token_ids)
        text = answer.writing.take(lambda request: self.engine.finish(request, stopped=True))
        piece = Piece(text, range(before, len(completion.token_ids)), completion.finish_reason)
        self._note(answer, piece)
        answer.put(piece)
        return completion.finish_reason is not None

    def _note(self, answer: Answer, piece: Piece) -> None:
        now = time.monotonic()
        if piece.tokens:
            self.metrics.grew(len(piece.tokens), now - (answer.last or answer.since), first=answer.last is None)
            answer.first, answer.last = answer.first or now, now
        if piece.finish_reason is not None:
            self.metrics.finished(piece.finish_reason, now - answer.since)

    def _note_failure(self, error: Exception) -> None:
        lost = isinstance(error, RankError)
        log.error("a step failed, and all requests with it: %s", error, exc_info=not lost)
        # Any other error ended the requests, and the next step may do better.
        self.failure = str(error) if lost else None

    def _recover(self) -> None:
        """Start ranks again that have died. They count as running when they are as ready as those were."""
        try:
            self.engine.recover()
            if self.model.warmed_up:
                self.model.warm_up()
            self.failure = None
            log.warning("the ranks run again")
        except Exception as error:
            self.failure = str(error)
            log.error("the ranks could not be started again: %s", error)
