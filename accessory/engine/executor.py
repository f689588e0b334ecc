"""Who runs a step: this process, or all ranks of a model.

`LocalExecutor` runs it here. `GroupExecutor` is the first rank of a process group: it runs the step and tells the other
ranks, which `follow`. `rank_executor` has a third: the driver of ranks that it starts itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist

from accessory.engine.runner import Runner
from accessory.engine.scheduler import StepPlan, StepResult
from accessory.errors import AccessoryError, RankError, one_line
from accessory.launch.peers import Peers
from accessory.parallel.mesh import Ranks, broadcast_object

RUN, SCORE, ITEM, END = "run", "score", "item", "end"  # what a message to the ranks is
IDLE = timedelta(days=365)  # how long the ranks wait for the next message
OUT_OF_STEP = "the ranks are out of step after a failure; start them again"


class StepHandle(Protocol):
    def result(self) -> StepResult: ...


class Executor(Protocol):
    ahead: int  # steps that may be under way while the next one is planned

    def submit(self, plan: StepPlan) -> StepHandle:
        """Start a step. Steps run in the order of these calls."""
        ...

    def score(self, rows: list[list[int]], images: list[Any]) -> list[Any]:
        """The logits after each token of the rows: see `Runner.score`."""
        ...

    def drop(self) -> None:
        """Forget the steps whose results nobody will ask for, because something failed."""
        ...

    def recover(self) -> None:
        """Start ranks again that have ended."""
        ...

    def close(self) -> bool:
        """Let the other ranks go. Returns whether that ends what the requests have computed."""
        ...


class LocalExecutor:
    """This process is the model's only rank."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        # On a CPU the host computes the step itself, so planning ahead would only waste the step after a stop.
        self.ahead = 1 if runner.device.type == "cuda" else 0

    def submit(self, plan: StepPlan) -> StepHandle:
        return self.runner.run(plan)

    def score(self, rows: list[list[int]], images: list[Any]) -> list[Any]:
        return self.runner.score(rows, images)

    def drop(self) -> None:
        pass

    def recover(self) -> None:
        pass

    def close(self) -> bool:
        return False


# --------------------------------------------------------------------------- the ranks of a process group


class GroupExecutor(LocalExecutor):
    """The first rank of `ranks`. The others call `follow` with a runner of the same model.

    Messages pass through a gloo group of their own: they must not wait for what the GPUs do.
    """

    def __init__(self, runner: Runner, ranks: Ranks) -> None:
        super().__init__(runner)
        self._ranks = messages_between(ranks)
        self._peers = Peers(ranks.rank, ranks.size, partial(broadcast_object, ranks=self._ranks))
        self.broken = threading.Event()  # after a failure that the other ranks may not share

    def submit(self, plan: StepPlan) -> StepHandle:
        with self._peers.step():
            self.tell(RUN, plan)
            return _Watched(super().submit(plan), self._peers)

    def score(self, rows: list[list[int]], images: list[Any]) -> list[Any]:
        with self._peers.step():
            self.tell(SCORE, rows, images)
            return super().score(rows, images)

    def drop(self) -> None:
        self.broken.set()

    def recover(self) -> None:
        if self.broken.is_set():  # a launcher started the ranks, and only it can start them again
            raise RankError(OUT_OF_STEP)

    def close(self) -> bool:
        self.end_call()
        return True

    def tell(self, *message: Any) -> None:
        if self.broken.is_set():
            raise RankError(OUT_OF_STEP)
        broadcast_object(message, self._ranks)

    def end_call(self, value: Any = None, error: Exception | None = None) -> None:
        """Let the other ranks return from `follow` with this value or error. One that is gone needs no word."""
        if error is not None and not isinstance(error, AccessoryError):
            error = RankError(f"rank 0 failed: {failure_line(error)}")
        with contextlib.suppress(RuntimeError):
            broadcast_object((END, value, error, self.broken.is_set()), self._ranks)


class _Watched(NamedTuple):
    """A step whose result may never come, because another rank is gone."""

    step: StepHandle
    peers: Peers

    def result(self) -> StepResult:
        with self.peers.step():
            return self.step.result()


class Follower:
    """Every rank of a process group but the first: it does what the first one's `GroupExecutor` tells."""

    def __init__(self, runner: Runner, ranks: Ranks) -> None:
        self.runner, self._ranks = runner, messages_between(ranks)
        self._peers = Peers(ranks.rank, ranks.size, partial(broadcast_object, ranks=self._ranks))
        self.broken = threading.Event()

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
                value, error, broken = said
                if broken:
                    self.broken.set()
                if error is not None:
                    raise error
                return value
            elif kind != ITEM:
                with self._peers.step():
                    perform(self.runner, kind, said)


def perform(runner: Runner, kind: str, said: Sequence[Any]) -> Any:
    return runner.run(said[0]) if kind == RUN else runner.score(*said)


def messages_between(ranks: Ranks) -> Ranks:
    """A group of the same ranks whose messages need no GPU, and may be long in coming."""
    members = dist.get_process_group_ranks(ranks.group)
    return Ranks.of(dist.new_group(members, backend="gloo", timeout=IDLE, use_local_synchronization=True))


def failure_line(error: Exception) -> str:
    """An error that is no user's, in one line."""
    return f"{type(error).__name__}: {one_line(error)}"
