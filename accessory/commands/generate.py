"""`accessory generate`: what is asked is read and checked here, before torch is imported and a model loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from accessory.commands.answer_file import AnswerFile, open_answers
from accessory.commands.prompts import Prompts
from accessory.errors import InputError
from accessory.launch.environment import launch_of


def generate(options: argparse.Namespace) -> int:
    """Continue the prompts. InputError at the end where lines could not be answered.

    Under a launcher, only the first rank reads, prints and writes.
    """
    launch = launch_of()
    first = launch is None or launch.rank == 0
    if options.out is not None and not options.lines:
        raise InputError("--out: is for many prompts; give --lines and --prompt-file too")
    if options.out is not None and options.stream:
        raise InputError("--stream: shows a text while it is written, so give no --out")
    prompts = Prompts(options) if first else None
    if options.stream and prompts is not None and prompts.count > 1:
        raise InputError(f"--stream: got {prompts.count} prompts, but only one can be streamed")
    if options.system is not None and options.template is None:
        raise InputError("--system: a system message is part of a dialogue; give the --template that writes it too")
    if options.lines and not options.stream:
        return _answer_lines(options, prompts)
    asks = list(prompts or ())
    empty = [n for n, ask in enumerate(asks) if ask.said.get("prompt") == ""]
    if empty and options.template is None:
        raise InputError(f"prompts[{empty[0]}]: is empty; give at least one character")
    from accessory.commands.text import print_answers

    return print_answers(options, asks)


def _answer_lines(options: argparse.Namespace, prompts: Prompts | None) -> int:
    if options.out is None or prompts is None:
        return _answer(options, prompts, None)
    with open_answers(Path(options.out).expanduser(), prompts) as file:
        return _answer(options, prompts, file)


def _answer(options: argparse.Namespace, prompts: Prompts | None, file: AnswerFile | None) -> int:
    if file is not None and prompts is not None and file.done == prompts.count and launch_of() is None:
        return _end(options, prompts, file.failed, "were answered already")
    from accessory.commands.answering import answer_all
    from accessory.commands.opening import open_model
    from accessory.commands.text import needs_encoders

    with open_model(options, needs_encoders(options)) as model:
        if model is None or prompts is None:  # another rank than the first
            return 0
        failed = answer_all(options, model, prompts, file)
    return _end(options, prompts, failed, "are answered")


def _end(options: argparse.Namespace, prompts: Prompts, failed: int, how: str) -> int:
    if failed:
        where = "" if options.out is None else f"{options.out}: "
        raise InputError(f"{where}{failed} of {prompts.count} prompts could not be answered; their lines say why")
    if options.out is not None:
        print(f"{options.out}: all {prompts.count} prompts {how}")
    return 0
