"""Ranks as processes of a driver, which is no rank itself: it starts them, sends them plans, and can kill them.

`RankExecutor` is the driver's side, `serve` the life of a rank.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Collection
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from accessory.engine.executor import RUN, SCORE, failure_line, perform
from accessory.engine.runner import Runner
from accessory.engine.scheduler import StepPlan
from accessory.engine.step import Step
from accessory.errors import AccessoryError, RankError
from accessory.launch.rank_processes import GRACE, POLL, RankProcess, end_processes, who_ended

DONE, REFUSED, FAILED = "done", "refused", "failed"  # what a rank answers its driver

Start = Callable[[list[RankProcess]], Any]


class RankExecutor:
    """The driver of ranks, which are processes that it starts, kills and starts again.

    start: starts the processes and appends them to a list; what it returns is kept while they live. options: what each
    rank gets first, to load the model. A rank that dies or fails, or a first rank that says nothing for `step_timeout`
    (while loading `load_timeout`) seconds, ends all ranks with a RankError. The next step starts them again.
    """

    def __init__(
        self, start: Start, options: dict[str, Any], *, ahead: int, load_timeout: float, step_timeout: float
    ) -> None:
        self._start, self._options, self.ahead = start, options, ahead
        self._load_timeout, self._step_timeout = load_timeout, step_timeout
        self._ranks: list[RankProcess] = []
        self._kept: Any = None
        self._about: Any = None
        self._asked = 0  # answers of the first rank that are still to come
        self._closed = False

    def load(self) -> Any:
        """Start the ranks if they do not run. Returns what the first one says of the model."""
        if self._ranks:
            return self._about
        self._closed = False
        try:
            self._kept = self._start(self._ranks)
            self._about = self._introduce()
        except BaseException as error:
            closed = self._closed
            self.end()
            if closed and isinstance(error, RankError):  # the processes were killed while they started
                raise RankError("the ranks were closed while loading") from error
            raise
        # The scheduler's pages are numbers below this. Ranks that are started again must have as many.
        self._options["pages"] = self._about.pages
        return self._about

    def _introduce(self) -> Any:
        try:
            for rank in self._ranks:
                rank.limit(self._step_timeout)
                rank.connection.send({**self._options, "progress": self._options.get("progress") and rank.number == 0})
        except OSError as error:
            raise self._lost("loading", error) from error
        return self._hear("loading", self._load_timeout, len(self._ranks))

    def submit(self, plan: StepPlan) -> Answer:
        return self._ask("generating", RUN, plan)

    def score(self, rows: list[list[int]], images: list[Any]) -> list[Any]:
        return [torch.from_numpy(logits_TV) for logits_TV in self._ask("scoring", SCORE, rows, images).result()]

    def drop(self) -> None:
        """Hear what is still to come, for a moment; end the ranks where it does not come."""
        try:
            with contextlib.suppress(AccessoryError):
                while self._asked:
                    self.hear("generating", GRACE)
        except BaseException:  # Ctrl-C again
            self.end()
            raise

    def recover(self) -> None:
        self.load()

    def stop(self) -> None:
        """From any thread: kill the ranks. Whoever waits for them gets an error within `POLL` seconds.

        Their connections stay open: closing what another thread reads could let it read another file. `close` follows.
        """
        self._closed = True
        for rank in list(self._ranks):
            rank.kill()

    def close(self) -> bool:
        """After `stop`: tidy up, unless a later call has started the ranks again."""
        closed = self._closed
        if closed:
            self.end()
        return closed

    def end(self) -> None:
        ranks, self._ranks, self._asked = self._ranks, [], 0
        end_processes(ranks)
        self._kept = None

    def _ask(self, doing: str, *message: Any) -> Answer:
        self.load()
        sent = ForkingPickler.dumps(message)
        try:
            for rank in self._ranks:
                rank.connection.send_bytes(sent)
        except OSError as error:
            raise self._lost(doing, error) from error
        except BaseException:  # Ctrl-C: some may have been asked, others not
            self.end()
            raise
        self._asked += 1
        return Answer(self, doing)

    def hear(self, doing: str, patience: float | None = None) -> Any:
        """The first rank's next answer."""
        value = self._hear(doing, self._step_timeout if patience is None else patience, 1)
        self._asked -= 1
        return value

    def _hear(self, doing: str, patience: float, answers: int) -> Any:
        """Wait until so many ranks have answered. Returns the first rank's answer."""
        value, until = None, time.monotonic() + patience
        silent = {rank.number for rank in self._ranks}
        while answers:
            spoken = self._receive(doing)
            for number, (kind, *said) in spoken.items():
                if kind != DONE:
                    raise self._failure({n: words for n, words in spoken.items() if words[0] != DONE}, doing)
                value = said[0] if number == 0 else value
                answers -= 1
            silent -= spoken.keys()
            if not spoken and time.monotonic() > until:
                self.end()
                who = f"ranks {', '.join(map(str, sorted(silent)))}" if len(silent) > 1 else f"rank {min(silent)}"
                raise RankError(f"{who} said nothing for {patience:.0f} s while {doing}; the next call starts new ones")
        return value

    def _receive(self, doing: str, but: Collection[int] = ()) -> dict[int, tuple[Any, ...]]:
        """What ranks say within `POLL` seconds, by their numbers: one message each. but: those that say no more."""
        if self._closed:
            raise self._lost(doing)
        numbers: dict[Any, int] = {rank.connection: rank.number for rank in self._ranks if rank.number not in but}
        try:
            ready: list[Any] = wait(list(numbers), timeout=POLL)
        except OSError as error:  # this thread's signal handler has closed the ranks
            raise self._lost(doing, error) from error
        try:
            return {numbers[connection]: connection.recv() for connection in ready}
        except (EOFError, OSError) as error:
            raise self._lost(doing, error) from error
        except BaseException:  # Ctrl-C in the middle of a message
            self.end()
            raise

    def _failure(self, failures: dict[int, tuple[Any, ...]], doing: str) -> Exception:
        """The error for ranks that say they failed. It waits for a moment: others may fail alike, or be the cause.

        A user's error that the first rank meets too is raised as it is. A rank that died (`_lost`) is the cause of what
        the others say.
        """
        until = time.monotonic() + GRACE
        while len(failures) < len(self._ranks) and time.monotonic() < until:
            if 0 in failures and failures[0][0] == REFUSED:
                break
            heard = self._receive(doing, but=failures)
            failures |= {n: words for n, words in heard.items() if words[0] != DONE}
        self.end()
        if 0 in failures and failures[0][0] == REFUSED:
            return failures[0][1]
        number, (kind, *said) = min(failures.items(), key=lambda f: f[1][0] != REFUSED)
        if kind == REFUSED:
            return RankError(f"rank {number}, while {doing}: {said[0]}")
        failed = RankError(f"rank {number} failed while {doing}: {said[0]}")
        failed.__cause__ = Exception(said[1])
        return failed

    def _lost(self, doing: str, error: Exception | None = None) -> RankError:
        if self._closed:
            self.end()
            return RankError(f"the ranks were closed while {doing}")
        if isinstance(error, BlockingIOError):
            how = f"a rank took no message for {self._step_timeout:.0f} s"
        else:
            how = who_ended(self._ranks, GRACE) or "a rank closed its connection"
        self.end()
        return RankError(f"{how} while {doing}; the next call starts new ranks")


class Answer:
    """What the first rank will answer."""

    def __init__(self, executor: RankExecutor, doing: str) -> None:
        self._executor, self._doing = executor, doing

    def result(self) -> Any:
        return self._executor.hear(self._doing)


def serve(connection: Connection, runner: Runner, first: bool) -> None:
    """A rank's life: run what the driver asks for. The first rank answers.

    Answers wait for the GPU in a thread of their own, so that the next step is started meanwhile.
    """
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    if first:
        threading.Thread(target=_answer, args=(connection, answers), daemon=True).start()
    while True:
        kind, *said = connection.recv()
        try:
            value = perform(runner, kind, said)
            if first:
                answers.put(partial(_done, value))
        except Exception as error:
            failed = failure_of(error)
            if first:
                answers.put(lambda failed=failed: failed)
            else:
                connection.send(failed)


def _done(value: Step | list[Tensor]) -> tuple[Any, ...]:
    """Wait for what was performed, and make it a message."""
    return (DONE, value.result() if isinstance(value, Step) else [logits_TV.cpu().numpy() for logits_TV in value])


def _answer(connection: Connection, answers: queue.SimpleQueue[Any]) -> None:
    while True:
        get = answers.get()
        try:
            said = get()
        except Exception as error:
            said = failure_of(error)
        try:
            connection.send(said)
        except OSError:  # the driver is gone
            return


def failure_of(error: Exception) -> tuple[Any, ...]:
    """An error as a message to the driver: a user's error itself, of any other a line and the trace."""
    if isinstance(error, AccessoryError):
        return (REFUSED, error)
    return (FAILED, failure_line(error), traceback.format_exc())
