"""`accessory generate` and `accessory chat`: answer prompts and images with text, on one rank or several."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from accessory.commands.answering import Asking, first_ctrl_c, print_answer
from accessory.commands.opening import open_model
from accessory.commands.prompts import NO_IMAGE, Ask
from accessory.commands.text_options import named_adapters
from accessory.data.conversation import Conversation
from accessory.data.image_tokens import without_tag
from accessory.data.images import open_image
from accessory.data.templates import get_template
from accessory.errors import AccessoryError, InputError
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
        answers = [_show(stream, asking.tidy(asks[0]), _print_piece if options.json else _print_text)]
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


def chat(options: argparse.Namespace) -> int:
    """Talk in the terminal until the input ends."""
    if launch_of() is not None:
        raise InputError("chat: started as one of several ranks, which share no terminal; use --n-gpus N instead")
    seen = _see(options.image, visual=True) if options.image else None
    with open_model(options, needs_encoders(options)) as model:
        assert model is not None
        return _talk(options, model, seen)


def _talk(options: argparse.Namespace, model: Any, seen: _Seen | None) -> int:
    template = get_template(options.template, model.tokenizer)
    conversation = Conversation(template, options.system)
    fixed = len(conversation.messages)
    visual = needs_encoders(options)
    print(
        f"Template {template.name}. /undo takes the last round back, /clear all; "
        f"{'/image PATH begins a dialogue about an image; ' if visual else ''}/quit or Ctrl-D ends."
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
            before, seen = seen, _change(seen, text.removeprefix("/image").strip(), visual)
            if seen is not before:  # an image comes before the first question, so the dialogue begins again
                del conversation.messages[fixed:]
            continue
        if text in ("/undo", "/clear"):
            seen = None if text == "/clear" else seen
            keep = fixed if text == "/clear" else max(fixed, len(conversation.messages) - 2)
            del conversation.messages[keep:]
            print("(forgotten)")
            continue
        if not text:
            continue
        conversation.add("user", text if seen is None else without_tag(text))
        try:
            said = _show(
                model.stream(
                    conversation.prompt_ids(model.tokenizer),
                    image=None if seen is None else seen.picture,
                    max_gen_len=options.max_gen_len,
                    params=options.sampling,
                    additional_stop_symbols=[*template.stop_strings, *options.stop],
                    adapter=named_adapters(options)[0],
                ),
                template.reply,
            )
            answer = template.reply(said.text)
        except KeyboardInterrupt:  # stops this answer, not the chat; half an answer would confuse the next one
            print("\n(stopped; the round is forgotten)")
            conversation.messages.pop()
            continue
        except AccessoryError as error:
            print(f"\n({error}; the round is forgotten)")
            conversation.messages.pop()
            continue
        print()
        conversation.add("assistant", answer)


@dataclass(frozen=True)
class _Seen:
    path: str
    picture: Any  # Pillow's, decoded


def _see(words: str, visual: bool) -> _Seen | None:
    """Open the image at a typed path, or None for `NO_IMAGE`. The path may be quoted or escaped, as a terminal writes
    it when a file is dropped on it, and may begin with ~."""
    if words in NO_IMAGE:
        return None
    if not visual:
        raise InputError("/image: this chat is text only; start it with --with-visual")
    path = os.path.expanduser(words)
    if not os.path.exists(path):
        with contextlib.suppress(ValueError):
            if len(parts := shlex.split(words)) == 1:
                path = os.path.expanduser(parts[0])
    return _Seen(path, open_image(path))


def _change(seen: _Seen | None, words: str, visual: bool) -> _Seen | None:
    """The dialogue's image after `/image` with these words. Prints it, or the error where the old image stays."""
    try:
        seen = _see(words, visual) if words else seen
        print("(no image)" if seen is None else f"({seen.path}: the dialogue is about this image)")
    except AccessoryError as error:
        print(f"({error})")
    return seen


def _print_text(piece: str) -> None:
    print(piece, end="", flush=True)


def _print_piece(piece: str) -> None:
    if piece:
        print(json.dumps({"piece": piece}, ensure_ascii=False), flush=True)


def _show(
    stream: Iterator[Completion], tidy: Callable[[str], str], write: Callable[[str], None] = _print_text
) -> Completion:
    """Write a stream as it grows. Returns the whole answer."""
    shown = ""
    for answer in stream:
        whole = tidy(answer.text)
        write(whole[len(shown) :])
        shown = whole
    return answer


def needs_encoders(options: argparse.Namespace) -> bool:
    """Whether the image encoders must be loaded."""
    images = [options.image] if isinstance(options.image, str) else options.image or []
    return options.with_visual or any(name not in NO_IMAGE for name in images)
