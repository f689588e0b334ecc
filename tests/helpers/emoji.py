"""Made-up emoji, and a stand-in for the package of their font."""

from __future__ import annotations

from pathlib import Path

from accessory.errors import InputError
from examples.emoji.corpus import Emoji, code_of


def make(text: str, name: str, group: str) -> Emoji:
    return Emoji(code_of(text), text, name, group)


def no_font(*_: object) -> Path:
    """Stands in for `packages.noto_font` where apt-get is missing."""
    raise InputError("apt-get: not found")
