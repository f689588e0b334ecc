"""The tokenizer's own chat template: Jinja source that came with the weights, rendered in a sandbox.

The built-in templates (default, alpaca, mistral, chatml, none) are in `templates.py`.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from accessory.data.messages import Message, check_ends_with_user, read_messages
from accessory.data.template_base import Template
from accessory.data.template_names import OWN
from accessory.data.tokenizer import Tokenizer
from accessory.errors import InputError, MissingExtraError

_PROBE = "Probe"


class TokenizerTemplate(Template):
    """Gives the text and ids that Hugging Face's `apply_chat_template` gives, with one difference.

    A control string inside a message's content stays characters. So nobody can end a turn, or begin another one, by
    writing its marker.
    """

    name = OWN

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self._template = _compile(source)
        self._tokenizer = tokenizer
        self._control = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self.reply_space = self._space_before_reply()

    def text(self, messages: Iterable[Message], *, prompt: bool = False) -> str:
        return self._render(read_messages(messages), prompt)

    def prompt_ids(self, messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
        checked, guard = self._guarded(read_messages(messages))
        check_ends_with_user(checked)
        return self._ids(self._render(checked, prompt=True), guard, tokenizer, prefix=True)

    def encode(self, messages: Iterable[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        checked, guard = self._guarded(read_messages(messages))
        whole = self._render(checked, prompt=False)
        ids: list[int] = []
        mask: list[bool] = []
        done = 0

        def add(end: int, learn: bool) -> None:
            nonlocal done
            new = self._ids(whole[done:end], guard, tokenizer, prefix=not ids)
            ids.extend(new)
            mask.extend([learn] * len(new))
            done = max(done, end)

        for index, message in enumerate(checked):
            if message["role"] == "assistant":
                begin, end = self._answer_span(checked, index, whole)
                add(begin, learn=False)
                add(end, learn=True)
        add(len(whole), learn=False)
        return ids, mask

    def _answer_span(self, messages: Sequence[Message], index: int, whole: str) -> tuple[int, int]:
        """Where the answer in `messages[index]` begins in the rendered dialogue, and where its end marker ends."""
        before = self._render(messages[:index], prompt=True) if index else ""
        until = self._render(messages[: index + 1], prompt=False)
        if not (whole.startswith(until) and until.startswith(before)):
            raise InputError(
                f"messages[{index}]: the tokenizer's chat template writes this turn differently once it is past, so "
                "what is learnt cannot be told; choose a built-in template"
            )
        marked = until.rstrip()
        ends_in_marker = any(marked.endswith(text) for text in self._control)
        return len(before), len(marked) if ends_in_marker and len(marked) >= len(before) else len(until)

    def _space_before_reply(self) -> str:
        question = {"role": "user", "content": _PROBE}
        try:
            prompt = self._render([question], prompt=True)
            whole = self._render([question, {"role": "assistant", "content": _PROBE}], prompt=False)
        except InputError:
            return ""
        before, found, _ = whole.removeprefix(prompt).partition(_PROBE)
        return before if found and whole.startswith(prompt) and before.isspace() else ""

    def _guarded(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
        """The messages with a guard character inside every control string of their contents, and that character.

        The guard occurs nowhere else, and `_ids` takes it out again. It is "" where no content holds a control string.
        """
        contents = "".join(message["content"] for message in messages)
        if not any(text in contents for text in self._control):
            return messages, ""
        guard = next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in contents)
        control = re.compile("|".join(map(re.escape, self._control)))
        return [
            {**message, "content": control.sub(lambda found: found[0][0] + guard + found[0][1:], message["content"])}
            for message in messages
        ], guard

    def _ids(self, text: str, guard: str, tokenizer: Tokenizer, prefix: bool) -> list[int]:
        if not guard or guard not in text:
            return tokenizer.encode(text, bos=False, special=True, prefix=prefix)
        ids: list[int] = []
        markers = re.compile("(" + "|".join(map(re.escape, self._control)) + ")")
        for piece in markers.split(text):
            opens = prefix and not ids
            if piece in tokenizer.special_tokens:
                ids.append(tokenizer.special_tokens[piece])
            elif guard in piece:
                ids += tokenizer.encode(piece.replace(guard, ""), bos=False, prefix=opens)
            else:
                ids += tokenizer.encode(piece, bos=False, special=True, prefix=opens)
        return ids

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        try:
            return self._template.render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=prompt,
                **self._tokenizer.template_variables,
            )
        except InputError:
            raise
        except Exception as error:  # the template is somebody else's program and may raise anything
            message = f"template: the tokenizer's chat template cannot write these messages ({error})"
            raise InputError(message) from error


def _compile(source: str) -> Any:
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingExtraError("the tokenizer's own chat template needs Jinja: pip install jinja2") from error

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks answers for training. Here its content is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise InputError(f"template: the tokenizer's chat template refuses these messages: {message}")

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    extensions = [loopcontrols, Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise InputError(f"template: the tokenizer's chat template is not valid Jinja ({error})") from error
