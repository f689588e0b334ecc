"""The GPUs that are known by name, and their memories."""

from __future__ import annotations

from dataclasses import dataclass

from accessory.errors import ConfigError

# The memory that torch finds on each card, in GiB: a little less than its name says.
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
# The cards that are searched where no card is named and none is there.
USUAL = ("4090", "L40S", "H100", "H200")


@dataclass(frozen=True)
class Card:
    """A kind of card, and how many of them there are."""

    name: str
    nbytes: int
    count: int | None = None  # None: as many as are needed


def card_of(name: str, option: str = "--memory") -> Card:
    """The card of this name. ConfigError for an unknown one lists those that are known.

    option: the one that gives the memory of another card.
    """
    known = {key.lower(): key for key in CARDS}
    key = known.get(name.lower())
    if key is None:
        raise ConfigError(f"card: got {name!r}, but known are {', '.join(CARDS)}; give {option} GB for another")
    return Card(key, int(CARDS[key] * 2**30))
