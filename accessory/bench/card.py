"""The card at hand: its rates, and clocks for work on it. A CPU is a card too."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from accessory.ops.graphs import record

# The sizes of the copy (bytes) and of the product (rows, columns) that give the rates.
COPIED_GPU, COPIED_CPU = 2**32, 2**26
MULTIPLIED_GPU, MULTIPLIED_CPU = 8192, 512


class Card(NamedTuple):
    """A card and its rates, by which every floor divides."""

    name: str
    copy: float  # bytes a second of a copy on the device; bytes read and bytes written both count
    matmul: float  # operations a second of a large square product; a multiplication and its addition are two
    dtype: str  # of that product
    torch: str

    def __str__(self) -> str:
        return (
            f"{self.name}: copy {self.copy / 1e12:.3g} TB/s, {self.dtype} matmul {self.matmul / 1e12:.3g} TFLOP/s; "
            f"torch {self.torch}"
        )


def measure_card(device: torch.device, dtype: torch.dtype) -> Card:
    cuda = device.type == "cuda"
    source = torch.randn((COPIED_GPU if cuda else COPIED_CPU) // 4, device=device)
    copy = 2 * source.nbytes / seconds_of(partial(torch.empty_like(source).copy_, source), device, rounds=15)
    del source
    n = MULTIPLIED_GPU if cuda else MULTIPLIED_CPU
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    matmul = 2 * n**3 / seconds_of(partial(torch.matmul, a, b), device, rounds=15)
    del a, b
    free(device)
    name = (
        torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    )
    return Card(name, copy, matmul, str(dtype).removeprefix("torch."), torch.__version__)


# --------------------------------------------------------------------------- clocks


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    run: Callable[[], object], device: torch.device, rounds: int = 7, warm: int = 2, in_a_row: int = 1
) -> float:
    """Median seconds of `run` by the host's clock, from an idle device until it is idle again.

    in_a_row: calls between two such moments, of which a call's share counts: what the host does for one may then hide
    behind what the device does for the one before.
    """
    times = []
    for n in range(rounds + warm):
        wait(device)
        began = time.perf_counter()
        for _ in range(in_a_row):
            run()
        wait(device)
        if n >= warm:
            times.append((time.perf_counter() - began) / in_a_row)
    return statistics.median(times)


def seconds_in_turn(
    ways: Sequence[Callable[[], object]], device: torch.device, calls: int, *, graph: bool = True, rounds: int = 9
) -> float:
    """Seconds of one call of `ways`, which take turns, so that a cache does not hold what the next call reads.

    On a GPU all calls are one CUDA graph, so the time of launching them does not count. graph: False where they need
    the host; the card's own clock is used then too. calls: how many are timed together, at least. rounds: of those, of
    which the median counts.
    """
    turns = [ways[n % len(ways)] for n in range(-(-calls // len(ways)) * len(ways))]

    def all_turns() -> None:
        for way in turns:
            way()

    if device.type != "cuda":
        return seconds_of(all_turns, device, rounds=3, warm=1) / len(turns)
    if not graph:
        return _card_seconds(all_turns, rounds) / len(turns)

    def each_once() -> None:
        for way in ways:
            way()

    replay, _ = record(all_turns, torch.cuda.Stream(), warm=each_once)
    return _card_seconds(replay, rounds) / len(turns)


def _card_seconds(run: Callable[[], object], rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


# --------------------------------------------------------------------------- memory


def free(device: torch.device) -> None:
    """Give back the memory of what nobody holds any more, and let `peak_gb` begin anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
