"""A dialogue in the terminal, and the commands that change it: `Dialogue`. A command begins with a slash and a letter.

No torch is imported here: the answers may come from a server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accessory.command_line import meant
from accessory.commands.prompts import NO_IMAGE
from accessory.commands.text_options import SETTINGS, change_setting
from accessory.data.image_tokens import without_tag
from accessory.data.images import open_image
from accessory.data.messages import read_messages
from accessory.errors import InputError
from accessory.train.metrics import write_whole

Messages = list[dict[str, str]]

# A command -> (what follows it, what it does). Each is a method of `Dialogue`, but for those that end the chat.
COMMANDS = {
    "/help": ("", "this list"),
    "/system": ("TEXT", "the system message; none for none; alone it shows it"),
    "/set": ("NAME VALUE", "how answers are written; alone it shows all settings"),
    "/retry": ("", "asks the last question once more"),
    "/undo": ("", "takes the last round back"),
    "/clear": ("", "takes all rounds back"),
    "/save": ("FILE", "messages in JSON; /save --overwrite FILE replaces a file"),
    "/load": ("FILE", "goes on with a dialogue that was saved"),
    "/image": ("PATH", "a dialogue about an image; none for none; alone it shows it"),
    "/quit": ("", "ends the chat, as Ctrl-D does"),
    "/exit": ("", "the same"),
}
ENDING = ("/quit", "/exit")
REPLACE = "--overwrite"


class Dialogue:
    """The messages of a dialogue, its image, and how its answers are written (`options`, which /set changes).

    text_only: why no dialogue may be about an image; None where one may.
    """

    def __init__(self, options: argparse.Namespace, text_only: str | None, seen: Seen | None = None) -> None:
        self.options, self._text_only, self._seen = options, text_only, seen
        self.messages: Messages = []
        if options.system is not None:
            self.messages.append({"role": "system", "content": options.system})
        self._unanswered: str | None = None  # the question of a round that was stopped

    @property
    def image(self) -> Any:
        return None if self._seen is None else self._seen.picture

    def take(self, text: str) -> str | None:
        """The question in what a user typed. None for a command, which is run. InputError for what is neither."""
        if text.startswith("//"):
            return text[1:]
        if not (text[:1] == "/" and text[1:2].isalpha()):
            return text
        name, *rest = text.split(maxsplit=1)
        words = rest[0] if rest else ""
        if name not in COMMANDS:
            hint = meant(name, COMMANDS) or "; /help lists them."
            raise InputError(f"{name:.60} is no command{hint} Begin with // to send it as a message")
        if words and not COMMANDS[name][0]:
            raise InputError(f"{name}: got {words!r:.60}, but nothing follows it")
        return getattr(self, "_" + name[1:])(words)

    def ask(self, question: str) -> None:
        self._unanswered = None
        self._add("user", question if self._seen is None else without_tag(question))

    def answer(self, text: str) -> None:
        self._add("assistant", text)

    def forget(self) -> None:
        """Take the last question back, and its answer if it has one."""
        if (last := self._last_question()) is not None:
            self._unanswered = self.messages[last]["content"]
            del self.messages[last:]

    def _add(self, role: str, content: str) -> None:
        self.messages += read_messages([{"role": role, "content": content}])

    def _last_question(self) -> int | None:
        """The index of the last question among the messages."""
        return next((n for n in reversed(range(len(self.messages))) if self.messages[n]["role"] == "user"), None)

    def _begin_anew(self) -> None:
        self._unanswered = None
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    # ------------------------------------------------------------------------ commands

    def _help(self, _: str) -> None:
        for name, (follows, help_) in COMMANDS.items():
            if name != "/image" or self._text_only is None:
                print(f"{name} {follows}".ljust(18), help_)
        print("A backslash at its end carries a line on. Ctrl-C stops an answer.")

    def _system(self, text: str) -> None:
        old = self.messages[0]["content"] if self.messages[:1] and self.messages[0]["role"] == "system" else None
        if text:
            del self.messages[: int(old is not None)]
            old = None if text == "none" else text
            if old is not None:
                self.messages.insert(0, {"role": "system", "content": old})
        print("(no system message)" if old is None else f"(system message: {old})")

    def _set(self, words: str) -> None:
        shown = SETTINGS
        if words:
            name, *rest = words.split(maxsplit=1)
            shown = (name.replace("-", "_"),)
            if shown[0] not in SETTINGS:
                known = [setting.replace("_", "-") for setting in SETTINGS]
                raise InputError(f"/set: {name:.60} is no setting{meant(name, known) or '; /set alone lists them'}")
            if not rest:
                raise InputError(f"/set: there is no value; give /set {name} VALUE")
            change_setting(self.options, shown[0], rest[0])
        for setting in shown:
            value = getattr(self.options, setting)
            told = "none" if value is None else f"{value:g}" if isinstance(value, float) else value
            print(f"({setting.replace('_', '-')} {told})")

    def _retry(self, _: str) -> str:
        question = self._unanswered
        if question is None:
            self.forget()
            question, self._unanswered = self._unanswered, None
        if question is None:
            raise InputError("/retry: there is no question yet")
        return question

    def _undo(self, _: str) -> None:
        self.forget()
        self._unanswered = None
        print("(forgotten)")

    def _clear(self, _: str) -> None:
        self._seen = None
        self._begin_anew()
        print("(forgotten)")

    def _save(self, words: str) -> None:
        first, _, rest = words.partition(" ")
        replaces = first == REPLACE
        path = typed_path(rest.strip() if replaces else words, "/save")
        if not self.messages:
            raise InputError("/save: there is no message yet")
        if path.exists() and not path.is_file():
            raise InputError(f"/save: {path}: is no file; give another name")
        if path.exists() and not replaces:
            raise InputError(f"/save: {path}: is there already; /save {REPLACE} FILE replaces it")
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n"
        try:
            with write_whole(path) as file:
                file.write(text.encode("utf-8", "backslashreplace"))  # half a surrogate pair is escaped
        except OSError as error:
            raise InputError(f"/save: {path}: cannot be written ({error.strerror})") from error
        print(f"({path}: {_count(self.messages)}{'; the image is not in it' if self._seen is not None else ''})")

    def _load(self, words: str) -> None:
        path = typed_path(words, "/load")
        try:
            messages = read_messages(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"/load: {path}: cannot be read ({error.strerror})") from error
        except InputError as error:
            raise InputError(f"/load: {path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"/load: {path}: is no JSON ({str(error).splitlines()[0]})") from error
        self.messages, self._seen, self._unanswered = messages, None, None
        told = _count(messages)
        if messages[-1]["role"] == "user":
            self.forget()
            told += "; the last one has no answer, /retry asks for it"
        print(f"({path}: {told})")

    def _image(self, words: str) -> None:
        if words:
            self._seen = see(words, self._text_only)
            self._begin_anew()  # an image comes before the first question
        print("(no image)" if self._seen is None else f"({self._seen.path}: the dialogue is about this image)")


def _count(messages: Messages) -> str:
    return "1 message" if len(messages) == 1 else f"{len(messages)} messages"


@dataclass(frozen=True)
class Seen:
    """What a dialogue is about."""

    path: str
    picture: Any  # Pillow's, decoded


def see(words: str, text_only: str | None = None) -> Seen | None:
    """Open the image at a typed path, or None for `NO_IMAGE`."""
    if words in NO_IMAGE:
        return None
    if text_only is not None:
        raise InputError(f"/image: {text_only}")
    path = str(typed_path(words, "/image"))
    return Seen(path, open_image(path))


def typed_path(words: str, command: str) -> Path:
    """The path in what follows a command. It may begin with ~. It may be quoted or escaped, as a terminal writes it
    when a file is dropped on it."""
    if not words:
        raise InputError(f"{command}: there is no file; give {command} FILE")
    path = os.path.expanduser(words)
    if not os.path.exists(path):
        with contextlib.suppress(ValueError):
            if len(parts := shlex.split(words)) == 1:
                path = os.path.expanduser(parts[0])
    return Path(path)
