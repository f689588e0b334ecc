"""How many examples Hypothesis tries."""

from __future__ import annotations

from hypothesis import settings


def examples(number: int) -> int:
    """`number`, or a third of it in `make test`, whose examples are always the same ones.

    For the few properties that take seconds. `make test-all` tries the whole number.
    """
    return -(-number // 3) if settings.get_current_profile_name() == "repeatable" else number
