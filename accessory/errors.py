"""The errors a user can cause. Each message is one line: what was wrong, what was given, what would do."""

from __future__ import annotations

import re
from collections.abc import Iterable


class AccessoryError(Exception):
    """Base of every error that the user's input causes; the command line prints it without a traceback."""


class ConfigError(AccessoryError, ValueError):
    """A configuration field is missing, contradictory or out of range; the message names the field."""


class CheckpointError(AccessoryError, ValueError):
    """Files do not hold a whole and consistent model, as they should; the message names the file or tensor."""


class InputError(AccessoryError, ValueError):
    """A prompt, a sampling parameter or another run-time argument cannot be used."""


class BusyError(AccessoryError, RuntimeError):
    """Too many requests wait already; the message says how many. The same request may be answered later."""


class NonFiniteError(AccessoryError, ArithmeticError):
    """What a network computed is not a number, or infinite; the message names the likely cause."""


class ServerError(AccessoryError, RuntimeError):
    """A server that a command asks is not there, refuses, or breaks an answer off; the message has its address."""


class RankError(AccessoryError, RuntimeError):
    """A process that holds a part of the model died, hangs or failed; the message names the rank and how."""


class MissingExtraError(AccessoryError, ImportError):
    """A feature needs an optional dependency; the message gives the pip line."""


class MemoryFullError(AccessoryError, MemoryError):
    """Memory ran out; the message says what was asked for, what there is, and what would fit."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch could not get memory. torch has an error of its own for GPUs only."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY))
    )


def is_users(error: BaseException) -> bool:
    """Whether one line can explain the error to a user. Other errors are bugs, and need their traceback."""
    return isinstance(error, AccessoryError | OSError | NotImplementedError) or is_out_of_memory(error)


_NO_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "_ALLOC_FAILED")


def one_line(error: BaseException) -> str:
    """The error's message for a user: its first line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not is_out_of_memory(error) or isinstance(error, AccessoryError):
        return text
    # What torch says beside this number is about its own allocator.
    wanted = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    return "memory ran out: " + (f"{wanted[1]} more were asked for" if wanted else text)


def listed(items: Iterable[str], limit: int = 5, *, between: str = ", ") -> str:
    """Spell out the first `limit` items for a message and count the others: `a, b and 3 more` or `a; b; and 3 more`."""
    items = list(items)
    left = len(items) - limit
    if left <= 0:
        return between.join(items)
    return between.join(items[:limit]) + (" and" if between == ", " else f"{between}and") + f" {left} more"
