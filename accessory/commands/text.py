"""`accessory generate`: answer some prompts and images with text, on one rank or several."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from accessory.commands.answering import Asking, print_answer
from accessory.commands.interrupting import first_ctrl_c
from accessory.commands.opening import open_model
from accessory.commands.prompts import NO_IMAGE, Ask
from accessory.commands.talking import print_text, show
from accessory.data.images import open_image
from accessory.launch.environment import launch_of
from accessory.model.writing import Completion
from accessory.progress import progress_bar


def print_answers(options: argparse.Namespace, asks: list[Ask]) -> int:
    """Answer some prompts together and print the texts. On a launcher's other ranks, there are none."""
    images = [None if ask.image is None else open_image(ask.image) for ask in asks]  # before the model takes minutes
    with open_model(options, needs_encoders(options)) as model:
        return 0 if model is None else _print_answers(options, model, asks, images)


def _print_answers(options: argparse.Namespace, model: Any, asks: list[Ask], images: list[Any]) -> int:
    asking = Asking(options, model)
    requests = [asking.request(ask) for ask in asks]
    how = {
        "max_gen_len": options.max_gen_len,
        "params": options.sampling,
        "additional_stop_symbols": requests[0].stops,
    }
    if options.stream:
        stream = model.stream(requests[0].prompt, images[0], adapter=requests[0].adapter, **how)
        answers: list[Completion] = []
        show(_growing(stream, asking.tidy(asks[0]), answers), _print_piece if options.json else print_text)
        if not options.json:
            print()
            return 0
        stopped = False
    else:
        seen = images if any(image is not None for image in images) else None
        answers, stopped = _write(
            model,
            [request.prompt for request in requests],
            seen,
            {**how, "adapter": [request.adapter for request in requests]},
        )
    for number, (ask, answer) in enumerate(zip(asks, answers, strict=True), start=1):
        print_answer(options, asking, number, len(asks), ask, answer)
    if stopped:
        raise KeyboardInterrupt
    return 0


def _write(
    model: Any, asked: list[Any], images: list[Any] | None, how: dict[str, Any]
) -> tuple[list[Completion], bool]:
    """The answers, and whether Ctrl-C stopped them. A terminal shows how many tokens the longest one has."""
    bar = progress_bar(how["max_gen_len"], "writing", sys.stderr.isatty(), unit=" tokens")
    if launch_of() is not None:  # the launcher ends all ranks
        with bar:
            return model.complete(asked, images, **how, on_step=lambda n: bar.update(n - bar.n)), False
    with bar, first_ctrl_c() as stopped:
        told = {"cancelled": stopped.is_set, "on_step": lambda n: bar.update(n - bar.n)}
        return model.complete(asked, images, **how, **told), stopped.is_set()


def _print_piece(piece: str) -> None:
    if piece:
        print(json.dumps({"piece": piece}, ensure_ascii=False), flush=True)


def _growing(stream: Iterator[Completion], tidy: Callable[[str], str], last: list[Completion]) -> Iterator[str]:
    """The tidied text so far, with each token. `last` then has the answer."""
    for answer in stream:
        last[:] = [answer]
        yield tidy(answer.text)


def needs_encoders(options: argparse.Namespace) -> bool:
    """Whether the image encoders must be loaded."""
    images = [options.image] if isinstance(options.image, str) else options.image or []
    return options.with_visual or any(name not in NO_IMAGE for name in images)
