"""Which set-ups fit: cards and their memories, and the search for the fewest cards that a task runs on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from accessory.errors import ConfigError
from accessory.planner.memory import Formats, Setup, Training
from accessory.planner.peaks import Estimate, estimate

# What torch finds on each, in GiB: a little less than what the box says.
CARDS: dict[str, float] = {
    "B200": 178.3,
    "H200": 139.7,
    "H100": 79.1,
    "A100-80": 79.1,
    "A100-40": 39.4,
    "L40S": 44.4,
    "A40": 44.4,
    "A6000": 47.5,
    "6000-Ada": 47.5,
    "5090": 31.3,
    "4090": 23.6,
    "3090": 23.6,
    "L4": 22.0,
    "A10": 22.0,
}
# Of a card's memory, what has to be left over before a set-up is proposed: estimates are not exact.
RESERVE = 0.03
# What is looked at where no card is named and none is there.
USUAL = ("4090", "L40S", "H100", "H200")
# From the least rounded to the most; of equals, the smaller.
FORMATS: tuple[str | None, ...] = (None, "int8", "fp8", "nf4", "int4")
COUNTS = (1, 2, 4, 8, 16, 32, 64)
PARTS = (1, 2, 4, 8)  # model-parallel ranks: those of one machine


@dataclass(frozen=True)
class Card:
    """A kind of card; `count` of them are there, or as many as one likes (None)."""

    name: str
    nbytes: int
    count: int | None = None


@dataclass(frozen=True)
class Fitting:
    setup: Setup
    card: Card
    estimate: Estimate

    @property
    def margin(self) -> int:
        return self.card.nbytes - self.estimate.total


def card_of(name: str) -> Card:
    """ConfigError for a card that is not known, naming those that are."""
    known = {key.lower(): key for key in CARDS}
    key = known.get(name.lower())
    if key is None:
        raise ConfigError(f"card: got {name!r}, but known are {', '.join(CARDS)}; give --memory GB for another")
    return Card(key, int(CARDS[key] * 2**30))


def fitting(setup: Setup, card: Card) -> Fitting | None:
    """None where it does not fit with something to spare, or cannot be cut or quantised so."""
    try:
        found = Fitting(setup, card, estimate(setup))
    except ConfigError:
        return None
    return found if found.margin >= RESERVE * card.nbytes else None


def smallest(setup: Setup, card: Card, limit: int = 5) -> list[Fitting]:
    """Set-ups for the task of `setup` on cards of one kind: the fewest cards first, of those the least rounded.

    A number of cards and a format appear once, with the fewest model-parallel ranks, and without recomputing and
    without sharding frozen weights where that is enough.
    """
    found: list[Fitting] = []
    for count in COUNTS:
        if card.count is not None and count > card.count:
            break
        for format in _formats(setup):
            candidates = (fitting(s, card) for s in _candidates(setup, count, format))
            best = next((c for c in candidates if c is not None), None)
            if best is not None:
                found.append(best)
            if len(found) == limit:
                return found
    return found


def smallest_of_each(setup: Setup, cards: Sequence[Card]) -> list[Fitting]:
    """The first of `smallest` for each kind of card."""
    return [best for card in cards for best in smallest(setup, card, 1)]


def _formats(setup: Setup) -> Iterator[Formats]:
    """The set-up's own, where it chose part by part, and the plain ones; full finetuning rounds nothing."""
    if isinstance(setup.task, Training) and setup.task.kind == "full":
        yield Formats()
        return
    plain = [Formats.of(name) for name in FORMATS]
    if setup.formats not in plain:
        yield setup.formats
    yield from plain


def _candidates(setup: Setup, count: int, formats: Formats) -> Iterator[Setup]:
    if not isinstance(setup.task, Training):
        if count in PARTS:
            yield from _cut(setup, tp=count, dp=1, formats=formats)
        return
    for recompute in (True,) if setup.task.checkpointing else (False, True):
        for tp in (n for n in PARTS if count % n == 0):
            for mode in ("sdp", "fsdp") if count > tp else ("sdp",):
                task = replace(setup.task, checkpointing=recompute, data_parallel=mode)
                yield from _cut(setup, tp=tp, dp=count // tp, formats=formats, task=task)


def _cut(setup: Setup, **changes: object) -> Iterator[Setup]:
    try:
        yield replace(setup, **changes)  # type: ignore[arg-type]
    except ConfigError:  # the network has no such parts
        return
