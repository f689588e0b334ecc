"""Who runs a step: this process, or all ranks of a model.

`LocalExecutor` runs it here. `GroupExecutor` is the first rank of a process group: it runs the step and tells the other
ranks, which `follow`. `RankExecutor` is the driver of ranks that it starts itself. It is no rank, and can kill them.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.engine.runner import About, Runner, Step
from accessory.engine.scheduler import StepPlan, StepResult
from accessory.errors import AccessoryError, RankError
from accessory.launch.rank_processes import GRACE, POLL, RankProcess, end_processes, who_ended
from accessory.parallel.mesh import Ranks, broadcast_object

RUN, SCORE, ITEM, END = "run", "score", "item", "end"  # what a message to the ranks is
DONE, REFUSED, FAILED = "done", "refused", "failed"  # what a rank answers its driver
IDLE = timedelta(days=365)  # how long the ranks wait for the next message


class StepHandle(Protocol):
    def result(self) -> StepResult: ...


class Executor(Protocol):
    ahead: int  # steps that may be under way while the next one is planned

    def load(self) -> About:
        """Start the ranks if they do not run. As long as they live, the answer is the same object."""
        ...

    def submit(self, plan: StepPlan) -> StepHandle:
        """Start a step. Steps run in the order of these calls."""
        ...

    def score(self, rows: list[list[int]], images: list[Any]) -> list[Any]:
        """The logits after each token of the rows: see `Runner.score`."""
        ...

    def drop(self) -> None:
        """Forget the steps whose results nobody will ask for, because something failed."""
        ...


class LocalExecutor:
    """This process is the model's only rank."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        # On a CPU the host computes the step itself, so planning ahead would only waste the step after a stop.
        self.ahead = 1 if runner.device.type == "cuda" else 0

    def load(self) -> About:
        return self.runner.about

    def submit(self, plan: StepPlan) -> Step:
        return self.runner.run(plan)

    def score(self, rows: list[list[int]], images: list[Any]) -> list[Any]:
        return self.runner.score(rows, images)

    def drop(self) -> None:
        pass


# --------------------------------------------------------------------------- the ranks of a process group


class GroupExecutor(LocalExecutor):
    """The first rank of `ranks`. The others call `follow` with a runner of the same model.

    Messages pass through a gloo group of their own: they must not wait for what the GPUs do.
    """

    def __init__(self, runner: Runner, ranks: Ranks) -> None:
        super().__init__(runner)
        self._ranks = messages_between(ranks)
        self.broken = threading.Event()  # after a failure that the other ranks may not share

    def submit(self, plan: StepPlan) -> Step:
        self.tell(RUN, plan)
        return super().submit(plan)

    def score(self, rows: list[list[int]], images: list[Any]) -> list[Any]:
        self.tell(SCORE, rows, images)
        return super().score(rows, images)

    def drop(self) -> None:
        self.broken.set()

    def tell(self, *message: Any) -> None:
        broadcast_object(message, self._ranks)


class Follower:
    """Every rank of a process group but the first: it does what the first one's `GroupExecutor` tells."""

    def __init__(self, runner: Runner, ranks: Ranks) -> None:
        self.runner, self._ranks = runner, messages_between(ranks)

    def follow(self) -> Generator[Any, None, Any]:
        """Run the first rank's steps. Yields its items, and returns or raises what its call ends with."""
        left = False  # the reader wants no more items, but the first rank's call goes on
        while True:
            kind, *said = broadcast_object(None, self._ranks)
            if kind == ITEM and not left:
                try:
                    yield said[0]
                except GeneratorExit:
                    left = True
            elif kind == END:
                value, error = said
                if error is not None:
                    raise error
                return value
            elif kind != ITEM:
                perform(self.runner, kind, said)


def perform(runner: Runner, kind: str, said: Sequence[Any]) -> Any:
    return runner.run(said[0]) if kind == RUN else runner.score(*said)


def messages_between(ranks: Ranks) -> Ranks:
    """A group of the same ranks whose messages need no GPU, and may be long in coming."""
    members = dist.get_process_group_ranks(ranks.group)
    return Ranks.of(dist.new_group(members, backend="gloo", timeout=IDLE, use_local_synchronization=True))


# --------------------------------------------------------------------------- ranks as processes of a driver

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
            for rank in self._ranks:
                rank.connection.send({**self._options, "progress": self._options.get("progress") and rank.number == 0})
            self._about = self._hear("loading", self._load_timeout, len(self._ranks))
        except OSError as error:
            raise self._lost("loading") from error
        except BaseException:
            self.end()
            raise
        return self._about

    def submit(self, plan: StepPlan) -> Answer:
        return self._ask(RUN, plan)

    def score(self, rows: list[list[int]], images: list[Any]) -> list[Any]:
        return [torch.from_numpy(logits_TV) for logits_TV in self._ask(SCORE, rows, images).result()]

    def drop(self) -> None:
        """Hear what is still to come, for a moment; end the ranks where it does not come."""
        with contextlib.suppress(RankError):
            while self._asked:
                self.hear(GRACE)

    def close(self) -> None:
        """End the ranks, also while another thread waits for them: it notices."""
        self._closed = True
        self.end()

    def end(self) -> None:
        ranks, self._ranks, self._asked = self._ranks, [], 0
        end_processes(ranks)
        self._kept = None

    def _ask(self, *message: Any) -> Answer:
        self.load()
        sent = ForkingPickler.dumps(message)
        try:
            for rank in self._ranks:
                rank.connection.send_bytes(sent)
        except OSError as error:
            raise self._lost("a step") from error
        except BaseException:  # Ctrl-C: some may have been asked, others not
            self.end()
            raise
        self._asked += 1
        return Answer(self)

    def hear(self, patience: float | None = None) -> Any:
        """The first rank's next answer."""
        value = self._hear("a step", self._step_timeout if patience is None else patience, 1)
        self._asked -= 1
        return value

    def _hear(self, doing: str, patience: float, answers: int) -> Any:
        """Wait until so many ranks have answered. Returns the first rank's answer."""
        value, until = None, time.monotonic() + patience
        connections = {rank.connection: rank for rank in self._ranks}
        while answers:
            ready = wait(list(connections), timeout=POLL)
            if not ready and time.monotonic() > until:
                self.end()
                silence = f"the ranks said nothing for {patience:.0f} s while {doing}"
                raise RankError(f"{silence}; the next call starts them again")
            for connection in ready:
                rank = connections[connection]  # type: ignore[index]
                try:
                    kind, *said = rank.connection.recv()
                except (EOFError, OSError) as error:
                    raise self._lost(doing) from error
                except BaseException:  # Ctrl-C in the middle of a message
                    self.end()
                    raise
                if kind != DONE:
                    self.end()
                    raise _failure(rank.number, kind, said, doing)
                value = said[0] if rank.number == 0 else value
                answers -= 1
        return value

    def _lost(self, doing: str) -> RankError:
        how = who_ended(self._ranks, GRACE) or "a rank closed its connection"
        self.end()
        if self._closed:
            return RankError(f"the ranks were closed while {doing}")
        return RankError(f"{how} while {doing}; the next call starts the ranks again")


class Answer:
    """What the first rank will answer."""

    def __init__(self, executor: RankExecutor) -> None:
        self._executor = executor

    def result(self) -> Any:
        return self._executor.hear()


def _failure(number: int, kind: str, said: Sequence[Any], doing: str) -> Exception:
    if kind == REFUSED and number == 0:
        return said[0]
    error = RankError(f"rank {number} failed while {doing}: {said[0]}")
    if len(said) > 1:
        error.__cause__ = Exception(said[1])
    return error


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
            connection.send(get())
        except Exception as error:
            connection.send(failure_of(error))


def failure_of(error: Exception) -> tuple[Any, ...]:
    """An error as a message to the driver: a user's error itself, of any other a line and the trace."""
    if isinstance(error, AccessoryError):
        return (REFUSED, error)
    line = str(error).splitlines()[0] if str(error) else ""
    return (FAILED, f"{type(error).__name__}: {line}", traceback.format_exc())
