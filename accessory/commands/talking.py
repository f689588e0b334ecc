"""A dialogue in the terminal: questions are read, answers shown, rounds taken back. Who answers is given.

No torch is imported here: the answers may come from a server.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from accessory.commands.prompts import NO_IMAGE
from accessory.data.image_tokens import without_tag
from accessory.data.images import open_image
from accessory.data.messages import read_messages
from accessory.errors import AccessoryError, InputError

Messages = list[dict[str, str]]
# From the messages of a dialogue and its image, or None, to the answer while it grows: always all of it so far.
Answering = Callable[[Messages, Any], Iterator[str]]


def talk(
    answering: Answering, greeting: str, *, system: str | None, text_only: str | None, seen: Seen | None = None
) -> int:
    """Talk until the input ends. Returns the exit status.

    text_only: why no dialogue may be about an image; None where one may.
    """
    messages: Messages = [] if system is None else [{"role": "system", "content": system}]
    fixed = len(messages)
    print(
        f"{greeting}. /undo takes the last round back, /clear all; "
        f"{'/image PATH begins a dialogue about an image; ' if text_only is None else ''}/quit or Ctrl-D ends."
    )
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            print()
            return 0
        if text in ("/quit", "/exit"):
            return 0
        if text.split(maxsplit=1)[:1] == ["/image"]:
            before, seen = seen, _change(seen, text.removeprefix("/image").strip(), text_only)
            if seen is not before:  # an image comes before the first question, so the dialogue begins again
                del messages[fixed:]
            continue
        if text in ("/undo", "/clear"):
            seen = None if text == "/clear" else seen
            keep = fixed if text == "/clear" else max(fixed, len(messages) - 2)
            del messages[keep:]
            print("(forgotten)")
            continue
        if not text:
            continue
        messages += read_messages([{"role": "user", "content": text if seen is None else without_tag(text)}])
        try:
            answer = show(answering(messages, None if seen is None else seen.picture))
        except KeyboardInterrupt:  # stops this answer, not the chat; half an answer would confuse the next one
            print("\n(stopped; the round is forgotten)")
            messages.pop()
            continue
        except AccessoryError as error:
            print(f"\n({error}; the round is forgotten)")
            messages.pop()
            continue
        print()
        messages += read_messages([{"role": "assistant", "content": answer}])


def print_text(piece: str) -> None:
    print(piece, end="", flush=True)


def show(growing: Iterator[str], write: Callable[[str], None] = print_text) -> str:
    """Write a text as it grows. Returns the whole text."""
    shown = ""
    for whole in growing:
        write(whole[len(shown) :])
        shown = whole
    return shown


@dataclass(frozen=True)
class Seen:
    """What a dialogue is about."""

    path: str
    picture: Any  # Pillow's, decoded


def see(words: str, text_only: str | None = None) -> Seen | None:
    """Open the image at a typed path, or None for `NO_IMAGE`. The path may be quoted or escaped, as a terminal writes
    it when a file is dropped on it, and may begin with ~."""
    if words in NO_IMAGE:
        return None
    if text_only is not None:
        raise InputError(f"/image: {text_only}")
    path = os.path.expanduser(words)
    if not os.path.exists(path):
        with contextlib.suppress(ValueError):
            if len(parts := shlex.split(words)) == 1:
                path = os.path.expanduser(parts[0])
    return Seen(path, open_image(path))


def _change(seen: Seen | None, words: str, text_only: str | None) -> Seen | None:
    """The dialogue's image after `/image` with these words. Prints it, or the error where the old image stays."""
    try:
        seen = see(words, text_only) if words else seen
        print("(no image)" if seen is None else f"({seen.path}: the dialogue is about this image)")
    except AccessoryError as error:
        print(f"({error})")
    return seen
