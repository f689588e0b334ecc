"""One line a field of a recipe: `option` and `required` give a field its help and the values that it takes.

`main_finetune.py` makes flags of these fields, `FinetuneConfig` checks them, and neither names one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Allowed:
    """The values of a field, beyond its type: a test, and the words that tell a user what passes it."""

    passes: Callable[[Any], bool]
    wanted: str


ANYTHING = Allowed(lambda _: True, "anything")
AT_LEAST_ONE = Allowed(lambda n: n >= 1, "at least 1")
COUNT = Allowed(lambda n: 1 <= n < 2**31, "at least 1 and less than 2^31")
NOT_NEGATIVE = Allowed(lambda n: n >= 0, "at least 0")
POSITIVE = Allowed(lambda n: n > 0, "more than 0")


def one_of(names: Collection[str]) -> Allowed:
    """One of these names."""
    return Allowed(lambda name: name in names, "one of " + ", ".join(names))


def option(default: Any, help: str, allowed: Allowed = ANYTHING) -> Any:
    """A field with a default. `allowed` judges every entry of a list by itself, and never None."""
    metadata = {"help": help, "allowed": allowed}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def required(help: str) -> Any:
    """A field that a recipe has to give."""
    return field(metadata={"help": help, "allowed": ANYTHING})
