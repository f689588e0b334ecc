"""Emoji that tests make up, and packages of them."""

from __future__ import annotations

from pathlib import Path

from accessory.errors import InputError
from examples.emoji.corpus import Emoji, code_of


def make(text: str, name: str, group: str) -> Emoji:
    return Emoji(code_of(text), text, name, group)


def no_font(*_: object) -> Path:
    """In the place of `packages.noto_font`."""
    raise InputError("apt-get: not found")
