"""Figures: what was timed, how long it took, and how that compares with the card's floor and with a peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from accessory.bench.card import Card

OURS = "accessory"
COLUMNS = ("who", "what", "ms", "tokens/s", "times the floor", "times the peer's speed", "peak, GB")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of a table. Figures with the same `what` did the same work, and may be compared.

    format: of the weights. nbytes, operations: what a rank must at least move and do; 0: not known.
    """

    who: str
    what: str
    format: str = "none"
    seconds: float | None = None  # None: `note` says why not
    tokens: int = 0  # computed in this time
    nbytes: float = 0.0
    operations: float = 0.0
    moved: float = 0.0  # bytes that are moved before or after all that, as an optimiser does
    peak_gb: float | None = None
    peer: bool = False  # whether another program did it
    note: str = ""

    def floor(self, card: Card) -> float | None:
        """The least seconds that the card could take."""
        return max(self.nbytes / card.copy, self.operations / card.matmul) + self.moved / card.copy or None

    def times_floor(self, card: Card) -> float | None:
        floor = self.floor(card)
        return self.seconds / floor if floor is not None and self.seconds is not None else None

    def failed(self, error: Exception) -> Figure:
        """The figure where nothing could be measured: a line of the table says why."""
        said = str(error).strip().splitlines()
        return replace(self, note=f"{type(error).__name__}: {said[0][:90] if said else ''}")


def quickest_peer(figure: Figure, figures: Sequence[Figure]) -> Figure | None:
    """The peer that did the same work the soonest: of those with weights of the same format, where there are any."""
    peers = [f for f in figures if f.peer and f.what == figure.what and f.seconds is not None]
    alike = [f for f in peers if f.format == figure.format]
    return min(alike or peers, key=lambda f: f.seconds or 0.0, default=None)


def peer_speed(figure: Figure, figures: Sequence[Figure]) -> float | None:
    """How many times as quick as that peer a figure of ours is."""
    peer = None if figure.peer else quickest_peer(figure, figures)
    if peer is None or peer.seconds is None or figure.seconds is None:
        return None
    return peer.seconds / figure.seconds


def cells(figure: Figure, figures: Sequence[Figure], card: Card) -> list[str]:
    """A row of the table."""
    if figure.seconds is None:
        return [figure.who, figure.what, figure.note, *["–"] * (len(COLUMNS) - 3)]
    rate = f"{figure.tokens / figure.seconds:,.0f}" if figure.tokens else "–"
    what = f"{figure.what} ({figure.note})" if figure.note else figure.what
    numbers = (figure.times_floor(card), peer_speed(figure, figures), figure.peak_gb)
    ratios = ("–" if n is None else f"{n:.{digits}f}" for n, digits in zip(numbers, (2, 2, 1), strict=True))
    return [figure.who, what, milliseconds(figure.seconds), rate, *ratios]


def milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.1f}" if ms >= 100 else f"{ms:.2f}" if ms >= 1 else f"{ms:.4f}"


def row(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def table(figures: Sequence[Figure], card: Card) -> list[str]:
    """Markdown."""
    rows = [row(cells(figure, figures, card)) for figure in figures]
    return [row(COLUMNS), "|" + "---|" * len(COLUMNS), *rows]


def as_json(figure: Figure, figures: Sequence[Figure], card: Card) -> dict[str, Any]:
    floor = figure.floor(card)
    return {
        **asdict(figure),
        "tokens_per_second": figure.tokens / figure.seconds if figure.tokens and figure.seconds else None,
        "floor_seconds": floor,
        "times_floor": figure.times_floor(card),
        "times_peer_speed": peer_speed(figure, figures),
    }


def in_short(figures: Sequence[Figure], card: Card) -> str:
    """All of ours in one line, for a log."""
    parts = []
    for figure in figures:
        if figure.peer or figure.seconds is None:
            continue
        ratio, speed = figure.times_floor(card), peer_speed(figure, figures)
        beside = [f"{ratio:.2f} × floor"] if ratio is not None else []
        beside += [f"{speed:.2f} × peer"] if speed is not None else []
        parts.append(f"{figure.who}, {figure.what}: {milliseconds(figure.seconds)} ms ({', '.join(beside) or '–'})")
    return "; ".join(parts)
