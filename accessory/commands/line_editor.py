"""Reads what is typed into a chat: on a terminal with prompt_toolkit, where it is installed; else line by line.

A line that ends with a backslash goes on in the next one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from accessory.commands.dialogue import COMMANDS
from accessory.commands.text_options import SETTINGS

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings

_GOES_ON = "\\"


def reader() -> Callable[[], str]:
    """A function that reads a message or a command, of one line or several. It raises EOFError where the input ends."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return _editor()
        except ImportError:  # the extra `chat` is not installed
            pass
    return _read_plainly


def _read_plainly() -> str:
    text = input("\n> ")
    while text.endswith(_GOES_ON):
        text = text.removesuffix(_GOES_ON) + "\n"
        try:
            text += input("  ")
        except EOFError:
            break
    return text


def _editor() -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.shortcuts import CompleteStyle

    session: PromptSession[str] = PromptSession(
        multiline=True,
        key_bindings=_keys(),
        prompt_continuation="  ",
        completer=_completer(),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,  # another style keeps lines below the prompt free for its menu
    )

    def read() -> str:
        print()
        return session.prompt([("bold", "> ")])

    return read


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith(_GOES_ON):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys


def _completer() -> Any:
    """Tab completes commands, the settings of /set, and paths."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class OfCommands(Completer):
        def get_completions(self, document: Document, event: Any) -> Iterator[Completion]:
            command, space, begun = document.text_before_cursor.partition(" ")
            if not space:
                names = [f"{name} " if follows else name for name, (follows, _) in COMMANDS.items()]
                yield from _beginning(command, names)
            elif command == "/set":
                yield from _beginning(begun, [name.replace("_", "-") for name in SETTINGS])
            elif command in ("/save", "/load", "/image"):
                yield from paths.get_completions(Document(begun), event)

    def _beginning(begun: str, words: Any) -> Iterator[Completion]:
        for word in words:
            if word.startswith(begun):
                yield Completion(word, -len(begun))

    return OfCommands()
