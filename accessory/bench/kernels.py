"""The kernels of one decoding step: how many there are a layer, and how long each takes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist

from accessory.bench.figures import row
from accessory.parallel.mesh import Ranks

REPLAYS = 10
COMMUNICATION = re.compile(r"all_?reduce|nccl|all_?gather|broadcast|exchange", re.IGNORECASE)
COLUMNS = ("kernel", "a layer", "µs each", "share of the step")
LONGEST = 70  # characters of a kernel's name


class Kernel(NamedTuple):
    name: str
    a_layer: float  # how many there are
    us_each: float
    share: float  # of the step's time


def kernels_of(step: Callable[[], object], layers: int, ranks: Ranks | None = None) -> list[Kernel]:
    """The rows of `rows_of` for a step that a graph replays. All ranks call it; each gets its own kernels."""
    from torch.profiler import ProfilerActivity, profile

    def replay(times: int) -> None:
        for _ in range(times):
            step()
        torch.cuda.synchronize()

    replay(2)
    if ranks is not None:
        dist.barrier(group=ranks.group)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPLAYS):
        step()
    end.record()
    torch.cuda.synchronize()
    whole = begin.elapsed_time(end) * 1e3 / REPLAYS
    with profile(activities=[ProfilerActivity.CUDA]):  # the first one starts the profiler, which takes seconds
        replay(1)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        replay(REPLAYS)
    on_card = torch.autograd.DeviceType.CUDA
    events = [(e.name, e.time_range.start, e.time_range.end) for e in found.events() if e.device_type == on_card]
    return rows_of(events, REPLAYS, layers, whole)


def rows_of(events: Iterable[tuple[str, float, float]], replays: int, layers: int, step: float) -> list[Kernel]:
    """The kernels by name, the longest in sum first.

    events: (name, begin, end) in µs of every kernel that ran in `replays` steps. step: µs of a step, with the gaps
    between kernels. A kernel may take its place while the one before still runs, and wait: its time counts from the end
    of the one before. Three sums come last: all kernels, those that communicate, and the gaps.
    """
    times: dict[str, list[float]] = defaultdict(list)
    last = float("-inf")
    for name, begin, end in sorted(events, key=lambda event: event[2]):
        times[short(name)].append(max(0.0, end - max(begin, last)))
        last = max(last, end)
    rows = [
        Kernel(name, len(us) / replays / layers, sum(us) / len(us), sum(us) / replays / step)
        for name, us in times.items()
    ]
    rows.sort(key=lambda kernel: -kernel.share)

    def total(name: str, some: list[Kernel]) -> Kernel:
        count, share = sum(k.a_layer for k in some), sum(k.share for k in some)
        return Kernel(name, count, share * step / layers / count if count else 0.0, share)

    every = total("all kernels", rows)
    speaking = total("of them communication", [k for k in rows if COMMUNICATION.search(k.name)])
    return [*rows, every, speaking, Kernel("between kernels", 0.0, 0.0, max(0.0, 1 - every.share))]


def short(name: str) -> str:
    """A kernel's name without its template arguments."""
    plain = re.sub(r"<.*", "", name.removeprefix("void ")) or name
    if len(plain) < 12 or plain.endswith("elementwise_kernel"):  # what it does stands among the arguments
        plain = name.removeprefix("void ")
    return plain[:LONGEST].replace("|", "/")


def table(rows: Iterable[Kernel]) -> list[str]:
    """Markdown."""
    lines = [row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    for name, count, us, share in rows:
        lines.append(row([name, f"{count:.2f}" if count else "–", f"{us:.2f}" if us else "–", f"{share:.1%}"]))
    return lines
