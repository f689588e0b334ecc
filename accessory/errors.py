"""The errors a user can cause. Each message is one line: what was wrong, what was given, what would do."""

from __future__ import annotations

from collections.abc import Iterable


class AccessoryError(Exception):
    """Base of every error that the user's input causes; the command line prints it without a traceback."""


class ConfigError(AccessoryError, ValueError):
    """A configuration field is missing, contradictory or out of range; the message names the field."""


class CheckpointError(AccessoryError, ValueError):
    """Files do not hold a whole and consistent model, as they should; the message names the file or tensor."""


class InputError(AccessoryError, ValueError):
    """A prompt, a sampling parameter or another run-time argument cannot be used."""


class NonFiniteError(AccessoryError, ArithmeticError):
    """What a network computed is not a number, or infinite; the message names the likely cause."""


class RankError(AccessoryError, RuntimeError):
    """A process that holds a part of the model died, hangs or failed; the message names the rank and how."""


class MissingExtraError(AccessoryError, ImportError):
    """A feature needs an optional dependency; the message gives the pip line."""


def listed(items: Iterable[str], limit: int = 5, *, between: str = ", ") -> str:
    """Spell out the first `limit` items for a message and count the others: `a, b and 3 more` or `a; b; and 3 more`."""
    items = list(items)
    left = len(items) - limit
    if left <= 0:
        return between.join(items)
    return between.join(items[:limit]) + (" and" if between == ", " else f"{between}and") + f" {left} more"
