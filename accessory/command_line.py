"""`Parser`, which reads the command lines of commands and demos: a mistake is one line, with what was meant.

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's parser, which also looks for what a misspelt option, command or value was meant to be.

    argparse leaves unknown options to the parser above, which shows the usage of another command. takes_more: whether
    words without a dash may be left over.
    """

    takes_more = False

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        self._refuse_unknown(words)
        found, rest = super().parse_known_args(words, namespace)
        # Of a parser with commands, the command's own parser has already refused what is wrong.
        wrong = rest if self._command_action() is None and not self.takes_more else [w for w in rest if w[:1] == "-"]
        if wrong:
            what = "no option of" if wrong[0].startswith("-") else "one word too many for"
            self.error(f"{wrong[0]} is {what} {self._name()}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}{'' if message.endswith('?') else f'; see {self.prog} --help'}\n")

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        """End with status 2 for an option that this parser does not have, before another error hides it."""
        known = list(self._option_string_actions)
        for word in words:
            option = word.partition("=")[0]
            if word == "--" or (self._command_action() is not None and not word.startswith("-")):
                return  # what follows is not for this parser to read
            # The beginning of an option stands for it. argparse takes a word with a space for a value.
            if word.startswith("--") and not any(name.startswith(option) for name in known):
                near = meant(option, known) if " " not in option else ""
                if near or " " not in word:
                    self.error(f"{option} is no option of {self._name()}{near}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        among = f"; there are {', '.join(choices)}"
        if action is self._command_action():
            self.error(f"{value} is no command of {self.prog}{meant(value, choices) or among}")
        raise argparse.ArgumentError(action, f"got {value!r}{meant(str(value), choices) or among}")

    def _command_action(self) -> argparse.Action | None:
        return next((a for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)

    def _name(self) -> str:
        return self.prog.partition(" ")[2] or self.prog


def meant(word: str, known: Iterable[str]) -> str:
    """The known word that is most like this one, as the end of a message; "" where none is."""
    spellings = dict.fromkeys(name.replace("_", "-") if name.startswith("--") else name for name in known)
    near = difflib.get_close_matches(word.replace("_", "-"), spellings, n=1)
    return f"; did you mean {near[0]}?" if near else ""
