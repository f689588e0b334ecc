"""The search for the setups of a task that take the fewest GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from accessory.errors import ConfigError
from accessory.formats import Format, Quant
from accessory.planner.cards import Card
from accessory.planner.peak import Estimate, estimate
from accessory.planner.setup import Setup, Training

# The part of a card's memory that a proposed setup must leave free, because estimates are not exact.
RESERVE = 0.03
# The formats that are tried, from the most exact to the least; None: 16 bits.
TRIED_FORMATS: tuple[Format | None, ...] = (None, "int8", "fp8", "nf4", "int4")
# The numbers of cards that are tried, and those of model-parallel ranks, which share one machine.
TRIED_CARDS = (1, 2, 4, 8, 16, 32, 64)
TRIED_TP = (1, 2, 4, 8)


@dataclass(frozen=True)
class Fitting:
    """A setup, the cards that it fits, and the estimate that says so."""

    setup: Setup
    card: Card
    estimate: Estimate

    @property
    def margin(self) -> int:
        return self.card.nbytes - self.estimate.total


def fitting(setup: Setup, card: Card) -> Fitting | None:
    """None where the setup would leave too little of the card free, or its network cannot be quantised so."""
    try:
        found = Fitting(setup, card, estimate(setup))
    except ConfigError:
        return None
    return found if found.margin >= RESERVE * card.nbytes else None


def smallest(setup: Setup, card: Card, limit: int = 5) -> list[Fitting]:
    """At most `limit` setups for the task of `setup` on cards of one kind.

    They come in order of the number of cards, then from the most exact format to the least. Each number and format
    comes once: without recomputing where that fits, with the fewest model-parallel ranks, and with frozen weights
    sharded only where it must be.
    """
    found: list[Fitting] = []
    for count in TRIED_CARDS:
        if card.count is not None and count > card.count:
            break
        for quant in _quants(setup):
            candidates = (fitting(s, card) for s in _candidates(setup, count, quant))
            best = next((c for c in candidates if c is not None), None)
            if best is not None:
                found.append(best)
            if len(found) == limit:
                return found
    return found


def on_all(setup: Setup, card: Card, batch_sizes: Sequence[int]) -> Fitting | None:
    """The setup for the training task of `setup` on all `card.count` cards, with the largest batch that fits.

    Without recomputing where that fits, with the fewest model-parallel ranks, and with frozen weights sharded only
    where it must be. None where nothing fits.
    """
    for candidate in _candidates(setup, card.count or 1, setup.quant):
        for size in batch_sizes:
            sized = replace(candidate, task=replace(candidate.task, batch_size=size))  # type: ignore[arg-type]
            if (found := fitting(sized, card)) is not None:
                return found
    return None


def smallest_of_each(setup: Setup, cards: Sequence[Card]) -> list[Fitting]:
    """The first of `smallest` for each kind of card."""
    return [best for card in cards for best in smallest(setup, card, 1)]


def _quants(setup: Setup) -> Iterator[Quant]:
    """The setup's own formats first, where it has chosen them part by part; full finetuning quantises nothing."""
    if isinstance(setup.task, Training) and setup.task.kind == "full":
        yield Quant()
        return
    tried = [Quant.parse(format) or Quant() for format in TRIED_FORMATS]
    if setup.quant not in tried:
        yield setup.quant
    yield from tried


def _candidates(setup: Setup, count: int, quant: Quant) -> Iterator[Setup]:
    """The ways to cut a setup over `count` cards, the preferred ones first."""
    if not isinstance(setup.task, Training):
        if count in TRIED_TP:
            yield from _cut(setup, tp=count, dp=1, quant=quant)
        return
    for recompute in (True,) if setup.task.checkpointing else (False, True):
        for tp in (n for n in TRIED_TP if count % n == 0):
            for mode in ("sdp", "fsdp") if count > tp else ("sdp",):
                task = replace(setup.task, checkpointing=recompute, data_parallel=mode)
                yield from _cut(setup, tp=tp, dp=count // tp, quant=quant, task=task)


def _cut(setup: Setup, **changes: object) -> Iterator[Setup]:
    try:
        yield replace(setup, **changes)  # type: ignore[arg-type]
    except ConfigError:  # the network cannot be cut so
        return
