"""The engine: requests in at any time, tokens out. It has no thread of its own: whoever waits for a token makes steps.

Several threads may ask at once. One of them makes the next step, for all requests; the others find their tokens ready.
Requests come and leave while a step runs: the scheduler is held only while it plans a step or takes its results.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from typing import Any

from accessory.engine.executor import Executor, StepHandle
from accessory.engine.pages import PagePool
from accessory.engine.runner import About
from accessory.engine.scheduler import Scheduler
from accessory.engine.sequence import Sequence
from accessory.errors import NonFiniteError, RankError
from accessory.limits import MAX_WAITING


class Engine:
    """A scheduler, and the executor of its steps.

    On a GPU the host plans a step, and handles the text of the one before, while the card runs the step between.
    compiles: whether kernels are compiled and graphs captured when a step of a new size first comes, as a GPU does.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, compiles: bool = False) -> None:
        self.scheduler, self.executor, self.compiles = scheduler, executor, compiles
        self._turn = threading.RLock()  # of the thread that makes a step, or whatever else the ranks do
        self._held = threading.Lock()  # of who reads or changes the scheduler; taken after a turn, never before one
        self._under_way: deque[StepHandle] = deque()

    @classmethod
    def of(cls, executor: Executor, about: About, max_waiting: int = MAX_WAITING) -> Engine:
        """An engine for ranks that say this of themselves. max_waiting: the most requests that wait at once."""
        pool = PagePool(about.pages)
        scheduler = Scheduler(
            pool,
            about.max_running,
            about.step_tokens,
            whole=about.on_cpu,
            max_waiting=max_waiting,
            longest=about.max_seq_len,
            vocab_size=about.vocab_size,
            deterministic=about.deterministic,
        )
        return cls(scheduler, executor, compiles=not about.on_cpu)

    def add(self, sequence: Sequence) -> Sequence:
        """Let a request wait for its turn.

        InputError where it can never be answered. BusyError where as many wait as may; nothing else changes then.
        """
        with self._held:
            self.scheduler.add(sequence)
        return sequence

    def check(self, sequence: Sequence) -> None:
        """InputError where the cache could never hold a request: what `add` would raise."""
        self.scheduler.check_room(sequence)

    def add_all(self, sequences: Many[Sequence]) -> None:
        """As `add`, of all of them or, where one is refused, of none."""
        with self._held:
            self.scheduler.check_queue(len(sequences))
            for sequence in sequences:
                self.scheduler.check_room(sequence)
            for sequence in sequences:
                self.scheduler.add(sequence)

    def recover(self) -> None:
        """Start ranks again that have died, instead of with the next step."""
        with self._turn:
            self.executor.recover()

    def finish(self, sequence: Sequence, *, stopped: bool = False) -> None:
        """End a request, at a stop text (`stopped`) or because nobody wants the rest.

        Its pages are free at once: a step that is under way may write them yet, but before any later one does.
        """
        with self._held:
            self.scheduler.finish(sequence, "stop" if stopped else "abort")

    def advance(self, requests: Many[Sequence]) -> None:
        """Make a step, unless one of the requests has tokens, or has ended."""
        with self._turn:
            if not any(request.drawn or request.finished for request in requests):
                self.step()

    def step(self) -> bool:
        """Start a step, and finish the oldest one. Returns whether there was anything to do.

        An error of the executor ends all requests with it: what their pages held is lost.
        """
        with self._turn, self._all_end_with_an_error():
            with self._held:
                plan = self.scheduler.plan()
            if plan is not None:
                self._under_way.append(self.executor.submit(plan))
            if self._under_way and (plan is None or len(self._under_way) > self.executor.ahead):
                self._finish_oldest()
                return True
            return plan is not None

    def _finish_oldest(self) -> None:
        """Wait for the oldest step under way, and take its results."""
        result = self._under_way.popleft().result()
        with self._held:
            self.scheduler.commit(result)

    def rehearse(self, *waves: Many[Sequence]) -> None:
        """Answer requests that nobody reads. They stay in no count, and in no page that others share.

        A wave of them comes when all of the one before have drawn a token; what is left of earlier ones ends with the
        last. Requests of other callers are answered meanwhile. Raises what a request ends with, but for logits that are
        not finite: random ids say little about a model.
        """
        begun: list[Sequence] = []
        try:
            for some in waves:
                self.add_all(some)
                begun += some
                while not all(request.drawn or request.finished for request in begun):
                    self.step()
                _raise_errors(begun)  # before another step would start ranks again that were closed
            while not all(request.finished for request in waves[-1]):
                self.step()
            _raise_errors(begun)
        finally:
            with self._turn:
                for request in begun:
                    self.finish(request)
                with self._all_end_with_an_error():
                    while self._under_way:  # theirs, which no other request would finish
                        self._finish_oldest()
                with self._held:
                    self.scheduler.forget(begun)

    def score(self, rows: list[list[int]], images: list[Any]) -> list[Any]:
        """The logits after each token of the rows: see `Runner.score`."""
        with self._turn, self._all_end_with_an_error():
            while self._under_way:  # the executor's answers come in the order of its tasks
                self._finish_oldest()
            return self.executor.score(rows, images)

    def close(self, error: Exception) -> None:
        """Let the other ranks go. All requests end with this error, because what their pages held is lost."""
        with self._turn:
            if self.executor.close():
                self._under_way.clear()
                with self._held:
                    self.scheduler.fail(error)

    @contextmanager
    def _all_end_with_an_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._under_way.clear()
            broken_off = RankError(f"a step was broken off ({type(error).__name__}) in another thread; ask again")
            with self._held:
                self.scheduler.fail(told_again(error) if isinstance(error, Exception) else broken_off)
            self.executor.drop()
            raise


def _raise_errors(requests: Many[Sequence]) -> None:
    """Raise the first error that ended a request, unless its logits were not finite."""
    for request in requests:
        if request.error is not None and not isinstance(request.error, NonFiniteError):
            raise told_again(request.error)


def told_again(error: BaseException) -> BaseException:
    """A copy of an error, for another caller.

    The error itself holds the frames of its call, and these hold requests. Kept in a request, it would keep a model
    alive that was dropped.
    """
    try:
        return copy.copy(error)
    except Exception:  # one whose arguments are not those of its class
        return RankError(f"{type(error).__name__}: {error}")
