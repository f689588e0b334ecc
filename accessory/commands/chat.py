"""`accessory chat` with a model that is loaded here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from accessory.commands.dialogue import Messages, see
from accessory.commands.opening import open_model
from accessory.commands.talking import Growing, talk
from accessory.commands.text import needs_encoders
from accessory.commands.text_options import named_adapters
from accessory.data.templates import get_template
from accessory.errors import InputError
from accessory.launch.environment import launch_of

TEXT_ONLY = "this chat is text only; start it with --with-visual"


def chat(options: argparse.Namespace) -> int:
    """Talk in the terminal until the input ends."""
    if launch_of() is not None:
        raise InputError("chat: started as one of several ranks, which share no terminal; use --n-gpus N instead")
    seen = see(options.image) if options.image else None
    visual = needs_encoders(options)
    with open_model(options, visual) as model:
        assert model is not None
        template = get_template(options.template, model.tokenizer)

        def answering(messages: Messages, image: Any) -> Iterator[Growing]:
            for answer in model.stream(
                template.prompt_ids(messages, model.tokenizer),
                image=image,
                max_gen_len=options.max_gen_len,
                params=options.sampling,
                additional_stop_symbols=[*template.stop_strings, *options.stop],
                adapter=named_adapters(options)[0],
            ):
                yield Growing(template.reply(answer.text), len(answer.token_ids))

        text_only = None if visual else TEXT_ONLY
        return talk(answering, f"Template {template.name}", options, text_only=text_only, seen=seen)
