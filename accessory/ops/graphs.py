"""Functions of a tensor as CUDA graphs: one launch instead of hundreds, and no compiler.

A function can be recorded if its kernels, their order and their shapes never depend on values, and nothing in it waits
for the card. A replay reads and writes the very tensors of the recording.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from accessory.ops.transfer import pinned

Out = TypeVar("Out")
_recorded: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()


def possible(device: torch.device) -> bool:
    """Whether work on `device` can be recorded."""
    return device.type == "cuda"


def record(
    run: Callable[[], Out], side: torch.cuda.Stream, *, warm: Callable[[], object] | None = None, pool: Any = None
) -> tuple[Callable[[], None], Out]:
    """Record `run` on the stream `side`: what replays it, and its result, which every replay fills anew.

    `warm` runs before, by default `run` itself: kernels are compiled and libraries started on first use, which a
    recording cannot hold. pool: whose memory the graph takes.
    """
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        (warm or run)()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # A stream of its own, because torch's default one belongs to the card of the process's first capture.
    # thread_local: another thread, as NCCL's watchdog, may call CUDA meanwhile.
    with _nothing_collected(), torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        out = run()
    _recorded.add(graph)
    return graph.replay, out


def free_all() -> None:
    """Free all graphs of this process; none may be replayed afterwards. A NCCL group that graphs sum over cannot end
    before them."""
    for graph in list(_recorded):
        graph.reset()
    _recorded.clear()


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """No graph is freed by the garbage collector meanwhile: CUDA refuses to, and the recording would fail with it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Graphs(Generic[Out]):
    """Graphs by key on one device, recorded when first needed. They take turns, so they share one memory pool.

    A copy has none: a graph reads the weights that it was recorded with.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: dict[Hashable, tuple[Callable[[], None], Tensor, Out]] = {}
        self._side: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._made)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._made

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs[Out]:
        return Graphs(self.device)

    def run(self, key: Hashable, function: Callable[[Tensor], Out], x: Tensor) -> Out:
        """`function(x)`, valid until the next call with any key.

        A key stands for one function and one shape. `x` may lie on the host; nothing waits for its copy.
        """
        if key not in self._made:
            self._made[key] = self._record(function, x)
        replay, input_, out = self._made[key]
        input_.copy_(pinned(x, self.device), non_blocking=True)
        replay()
        return out

    def again(self, key: Hashable) -> Callable[[], None] | None:
        """Replays the last run of `key`, for measurements; None where there was none."""
        made = self._made.get(key)
        return None if made is None else made[0]

    def _record(self, function: Callable[[Tensor], Out], x: Tensor) -> tuple[Callable[[], None], Tensor, Out]:
        with torch.cuda.device(self.device):  # streams and captures belong to a thread's current card
            if self._side is None:
                # One stream for all, because cuBLAS keeps a workspace for each.
                self._side, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            input_ = x.to(self.device, copy=True)
            replay, out = record(lambda: function(input_), self._side, pool=self._pool)
        return replay, input_, out
