"""The engine: requests in at any time, tokens out. It has no thread of its own: whoever waits for a token makes steps.

Several threads may ask at once. One of them makes the next step, for all requests; the others find their tokens ready.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import Any

from accessory.engine.executor import Executor, StepHandle
from accessory.engine.pages import PagePool
from accessory.engine.runner import About
from accessory.engine.scheduler import Scheduler
from accessory.engine.sequence import Sequence
from accessory.errors import RankError


class Engine:
    """A scheduler, and the executor of its steps.

    On a GPU the host plans a step, and handles the text of the one before, while the card runs the step between.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self.scheduler, self.executor = scheduler, executor
        self._about = executor.load()  # another object when the ranks are started anew
        self._turn = threading.RLock()
        self._under_way: deque[StepHandle] = deque()

    @classmethod
    def of(cls, executor: Executor, about: About) -> Engine:
        """An engine for ranks that say this of themselves."""
        pool = PagePool(about.pages)
        return cls(Scheduler(pool, about.max_running, about.step_tokens, whole=about.on_cpu), executor)

    def add(self, sequence: Sequence) -> Sequence:
        """Let a request wait for its turn. InputError where the cache could never hold it."""
        with self._turn:
            self.scheduler.add(sequence)
        return sequence

    def finish(self, sequence: Sequence, *, stopped: bool = False) -> None:
        """End a request, at a stop text (`stopped`) or because nobody wants the rest. Its pages are free at once."""
        with self._turn:
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
        with self._making():
            plan = self.scheduler.plan()
            if plan is not None:
                self._under_way.append(self.executor.submit(plan))
            if self._under_way and (plan is None or len(self._under_way) > self.executor.ahead):
                self._finish_oldest()
                return True
            return plan is not None

    def score(self, rows: list[list[int]], images: list[Any]) -> list[Any]:
        """The logits after each token of the rows: see `Runner.score`. An error ends all requests, as in a step."""
        with self._making():
            while self._under_way:  # answers come in the order of the questions
                self._finish_oldest()
            return self.executor.score(rows, images)

    def _finish_oldest(self) -> None:
        self.scheduler.commit(self._under_way.popleft().result())

    @contextlib.contextmanager
    def _making(self) -> Iterator[None]:
        """This thread's turn to use the executor."""
        with self._turn:
            try:
                about = self.executor.load()
                if about is not self._about:
                    self._under_way.clear()
                    self.scheduler.restart(PagePool(about.pages), RankError("the ranks were closed during the call"))
                    self._about = about
                yield
            except BaseException as error:
                self._under_way.clear()
                self.scheduler.fail(error)
                self.executor.drop()
                raise
