"""`accessory completion`: a shell's script that completes commands, options and values without starting Python."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from accessory.errors import MissingExtraError

# What an argument's value is, by the name that `--help` gives it.
_FILES = ("PATH", "FILE", "SRC", "DST", "A", "B", "CONFIG")
_FOLDERS = ("DIR",)


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script of bash, zsh or tcsh. MissingExtraError without shtab. `parser` is changed, and of no other use then.

    Options that are spelled with dashes or underscores are offered with dashes.
    """
    try:
        import shtab
    except ImportError as error:
        raise MissingExtraError("completion: needs shtab: pip install 'mixtral-accessory[completion]'") from error
    for action in _actions(parser):
        dashed = [name for name in action.option_strings if "_" not in name]
        action.option_strings = dashed or action.option_strings
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
