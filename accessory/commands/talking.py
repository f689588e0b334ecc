"""Talks in the terminal: reads what is typed, shows answers, takes back rounds that fail. Who answers is given.

No torch is imported here: the answers may come from a server.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from accessory.commands.dialogue import ENDING, Dialogue, Messages, Seen
from accessory.commands.line_editor import reader
from accessory.errors import AccessoryError


@dataclass(frozen=True)
class Growing:
    """An answer while it grows: all of its text so far. tokens: how many it has; None where nobody tells."""

    text: str
    tokens: int | None = None


# From the messages of a dialogue and its image, or None, to the answer while it grows.
Answering = Callable[[Messages, Any], Iterator[Growing]]


def talk(
    answering: Answering,
    greeting: str,
    options: argparse.Namespace,
    *,
    text_only: str | None,
    seen: Seen | None = None,
) -> int:
    """Talk until the input ends. Returns the exit status.

    options: how answers are written, and the system message; /set changes them. text_only: why no dialogue may be about
    an image; None where one may.
    """
    dialogue = Dialogue(options, text_only, seen)
    print(
        f"{greeting}. /undo takes the last round back, /clear all; "
        f"{'/image PATH begins a dialogue about an image; ' if text_only is None else ''}"
        "/help shows all commands; /quit or Ctrl-D ends."
    )
    read = reader()
    while True:
        try:
            text = read().strip()
        except EOFError:
            print()
            return 0
        if text in ENDING:
            return 0
        if not text:
            continue
        try:
            question = dialogue.take(text)
        except AccessoryError as error:
            print(f"({error})")
            continue
        if question is not None:
            _ask(dialogue, question, answering)


def _ask(dialogue: Dialogue, question: str, answering: Answering) -> None:
    """A round: a question and its answer. It is forgotten where the answer is stopped or fails, because half an answer
    would confuse the next one."""
    watch = _Watch()
    dialogue.ask(question)
    try:
        answer = show(watch.texts(answering(dialogue.messages, dialogue.image)))
    except KeyboardInterrupt:  # stops this answer, not the chat
        print("\n(stopped; the round is forgotten)")
        dialogue.forget()
        return
    except AccessoryError as error:
        print(f"\n({error}; the round is forgotten)")
        dialogue.forget()
        return
    print()
    watch.tell()
    dialogue.answer(answer)


class _Watch:
    """How quickly an answer comes."""

    def __init__(self) -> None:
        self._begun = self._ended = time.monotonic()
        self._first: float | None = None
        self._tokens: int | None = None

    def texts(self, growing: Iterator[Growing]) -> Iterator[str]:
        for answer in growing:
            if self._first is None and answer.text:
                self._first = time.monotonic()
            self._tokens = answer.tokens
            yield answer.text
        self._ended = time.monotonic()

    def tell(self) -> None:
        """On a terminal, a dim line. A first token takes as long as the whole prompt, so it does not count as speed."""
        if not sys.stdout.isatty() or self._tokens is None:
            return
        from rich.console import Console  # here, because a chat in a pipe needs none of it

        first = self._ended if self._first is None else self._first
        told = f"1 token, {first - self._begun:.2f} s" if self._tokens == 1 else f"{self._tokens} tokens"
        if self._tokens > 1 and self._ended > first:
            speed = (self._tokens - 1) / (self._ended - first)
            told += f", {speed:.1f} tokens/s after {first - self._begun:.2f} s"
        Console(highlight=False).print(told, style="dim", markup=False)


def print_text(piece: str) -> None:
    print(piece, end="", flush=True)


def show(growing: Iterator[str], write: Callable[[str], None] = print_text) -> str:
    """Write a text as it grows. Returns the whole text."""
    shown = ""
    for whole in growing:
        write(whole[len(shown) :])
        shown = whole
    return shown
