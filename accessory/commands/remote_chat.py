"""`accessory chat --url`: a dialogue with the model of a server. No torch is imported, and no model loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from accessory.commands.api_client import Server, read_key
from accessory.commands.dialogue import Messages
from accessory.commands.talking import Growing, talk
from accessory.commands.text_options import SAMPLING
from accessory.engine.sampling_params import SamplingParams

# OpenAI's own server knows these only. The others are sent where they were chosen.
_ALWAYS = ("temperature", "top_p")


def chat(options: argparse.Namespace) -> int:
    """Talk in the terminal until the input ends."""
    server = Server(options.url, read_key(options.api_key_file))
    model = server.choose_model(options.model)

    def answering(messages: Messages, _: Any) -> Iterator[Growing]:
        whole, tokens = "", None
        body = {"model": model, "messages": messages, **request_fields(options)}
        if sys.stdout.isatty():  # the last event then tells how many tokens there are
            body["stream_options"] = {"include_usage": True}
        # Closed at once where Ctrl-C stops an answer, so that the server stops writing it.
        with closing(server.stream("/v1/chat/completions", body)) as events:
            for event in events:
                for choice in event.get("choices", ()):
                    whole += choice.get("delta", {}).get("content") or ""
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                yield Growing(whole, tokens)

    return talk(answering, f"{model} at {server.url}", options, text_only="this chat sends no images")


def request_fields(options: argparse.Namespace) -> dict[str, Any]:
    """How answers are written, as fields of a request."""
    usual = SamplingParams()
    chosen = {name: getattr(options.sampling, name) for name in SAMPLING}
    fields = {name: value for name, value in chosen.items() if name in _ALWAYS or value != getattr(usual, name)}
    if options.max_gen_len is not None:
        fields["max_tokens"] = options.max_gen_len
    if options.stop:
        fields["stop"] = options.stop
    return fields
