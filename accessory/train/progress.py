"""What a run shows while it trains: a bar on a terminal, lines in a log file, and warnings about the router."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from accessory.errors import listed

# A small batch may well be one-sided, so both states must last for some steps in a row.
CROWDED, CROWDED_STEPS = 0.9, 20  # the router has collapsed: one expert gets this part of a layer's tokens
IDLE, IDLE_STEPS = 0.01, 100  # an expert idles: it gets less than this part of its fair share
NAMED = 4  # places that one warning names
BAR_COLUMNS = 100  # of a terminal that has room for a bar beside the numbers
# What a line can do without, the least important first.
SPARED = ("grad_norm", "balance", "lr", "memory_gb", "tokens_per_s")
_WITH_BAR = "{percentage:3.0f}%|{bar:10}| {desc}"
_WITHOUT_BAR = "{percentage:3.0f}%  {desc}"
_BESIDE_BAR, _BESIDE_PERCENTAGE = 18, 7  # columns that these take beside the text, the last one of the line included


class Progress:
    """One line that says how far a run is: `with Progress(steps) as progress: progress.update(record)` once a step.

    On a terminal it is a bar that is drawn anew, without the numbers that do not fit. Elsewhere it is a line for the
    first and the last step and every `every` seconds between. `done`: steps that a resumed run has made before.
    `enabled=False` shows nothing.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        *,
        every: float = 10.0,
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.total, self._every, self._enabled = total, every, enabled
        self._stream = sys.stderr if stream is None else stream
        self._terminal = enabled and self._stream.isatty()
        self._started: tuple[int, float] | None = None  # (step, time) after the first step, which is the slowest
        self._shown = -float("inf")
        self._pending = ""
        self._bar: Any = None
        self._done = done
        self._width: int | None = None  # of the text beside the bar; None: any

    def __enter__(self) -> Progress:
        if self._terminal:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total,
                initial=self._done,
                file=self._stream,
                bar_format=_WITH_BAR,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._pending:
            self._print(self._pending)
        self._pending = ""

    def update(self, record: Mapping[str, Any]) -> None:
        """Show a training record; an evaluation gets a line of its own."""
        if not self._enabled:
            return
        if record["kind"] == "eval":
            self.note(f"step {record['step']}: held-out loss {record['loss']:.4f}")
            return
        now, step = time.monotonic(), record["step"]
        left = self._seconds_left(record, now)
        self._started = self._started or (step, now)
        if self._bar is not None:
            self._fit()
            self._bar.set_description_str(describe(record, self.total, left, self._width), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        text = describe(record, self.total, left)
        if now - self._shown >= self._every:
            self._print(text)
            self._shown, self._pending = now, ""
        else:
            self._pending = text

    def note(self, text: str) -> None:
        """Show a line that stays; on a terminal it is above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._enabled:
            self._print(text)

    def _seconds_left(self, record: Mapping[str, Any], now: float) -> float:
        step = record["step"]
        if self._started is None or step <= self._started[0]:
            return (self.total - step) * record.get("step_s", 0.0)
        first, when = self._started
        return (self.total - step) * (now - when) / (step - first)

    def _fit(self) -> None:
        """Choose between a bar with a text and a text alone. A window may have changed its size since the last step."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except OSError:  # no terminal of the system's
            columns = 0
        wide = not columns or columns >= BAR_COLUMNS
        self._bar.ncols = columns or None
        self._bar.bar_format = _WITH_BAR if wide else _WITHOUT_BAR
        self._width = columns - (_BESIDE_BAR if wide else _BESIDE_PERCENTAGE) if columns else None

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def describe(record: Mapping[str, Any], total: int, seconds_left: float, width: int | None = None) -> str:
    """A training record as one line, without the values that it lacks, and without those that do not fit `width`."""
    parts = {"step": f"step {record['step']}/{total}", "left": f"{duration(seconds_left)} left"}
    for key, text in (
        ("loss", "loss {:.4f}"),
        ("balance", "balance {:.3f}"),
        ("lr", "lr {:.2e}"),
        ("tokens_per_s", "{} tokens/s"),
        ("memory_gb", "{:.1f} GB"),
        ("grad_norm", "grad norm {:.3g}"),
    ):
        if record.get(key) is not None:
            value = record[key]
            parts[key] = text.format(short(value) if key == "tokens_per_s" else value)
    for key in SPARED:
        if width is not None and len("  ".join(parts.values())) > width:
            parts.pop(key, None)
    return "  ".join(parts.values())


def duration(seconds: float) -> str:
    """1:05, 3:01:05 or 2 d 3 h, to the second."""
    if seconds != seconds or seconds < 0:
        return "?"
    minutes, s = divmod(round(min(seconds, 1e9)), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days} d {h} h" if days else f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def short(value: float) -> str:
    """A count in about three digits: 950, 12.3k, 4.56M, 7.89B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


class RouterWatch:
    """Warns once of each layer where the router has collapsed, and of each expert that idles.

    `top_k`: experts that a token visits. A layer's shares sum to 1, so an expert that every token visits has 1 / top_k.
    """

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self._in_a_row: dict[tuple[str, int, int], int] = {}
        self._said: set[tuple[str, int, int]] = set()

    def check(self, record: Mapping[str, Any]) -> list[str]:
        """The new warnings after a training record, one line each; mostly none."""
        seen: dict[tuple[str, int, int], int] = {}
        for layer, shares in enumerate(record["layers"]["share"]):
            for expert, share in enumerate(shares):
                place = (layer, expert)
                # Where a token visits most of the experts, each expert gets most of the tokens.
                if share * self.top_k >= CROWDED and 2 * self.top_k <= len(shares):
                    seen["crowded", *place] = self._in_a_row.get(("crowded", *place), 0) + 1
                if share * len(shares) <= IDLE:
                    seen["idle", *place] = self._in_a_row.get(("idle", *place), 0) + 1
        self._in_a_row = seen
        limits = {"crowded": CROWDED_STEPS, "idle": IDLE_STEPS}
        new = [key for key, steps in seen.items() if steps >= limits[key[0]] and key not in self._said]
        self._said.update(new)
        return [
            f"step {record['step']}: the router {what}: {places}. {remedy}"
            for kind, what, remedy in (
                (
                    "crowded",
                    f"has sent over {CROWDED:.0%} of the tokens to one expert for {CROWDED_STEPS} steps",
                    "Raise load_balancing_weight or lower lr.",
                ),
                (
                    "idle",
                    f"has hardly sent a token to an expert for {IDLE_STEPS} steps",
                    "Raise load_balancing_weight if it is to learn.",
                ),
            )
            if (places := _places([key[1:] for key in new if key[0] == kind]))
        ]


def _places(places: list[tuple[int, int]]) -> str:
    return listed((f"layer {layer} expert {expert}" for layer, expert in places), NAMED)
