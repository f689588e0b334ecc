"""The tokenizer's own chat template: Jinja source that came with the weights, rendered in a sandbox.

The built-in templates (default, alpaca, mistral, chatml, none) are in `templates.py`.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from accessory.data.messages import TOOL, Message, check_ends_with_user, is_learnt, read_messages, speaks_of_tools
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
        self._source, self._template = source, _compile(source)
        self._tokenizer = tokenizer
        self._control = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self.reply_space = self._space_before_reply()

    def text(self, messages: Iterable[Message], *, prompt: bool = False) -> str:
        return self._render(read_messages(messages), prompt)

    def jinja(self, tokenizer: Tokenizer) -> str:
        return self._source

    def prompt_ids(self, messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
        checked, guard = self._guarded(read_messages(messages))
        check_ends_with_user(checked)
        return self._ids(self._render(checked, prompt=True), guard, tokenizer, prefix=True)

    def encode(
        self, messages: Iterable[Message], tokenizer: Tokenizer, tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[bool]]:
        read = read_messages(messages, training=True)
        self._check_tools(read, tools)
        (checked, tools), guard = self._guarded((read, tools))
        whole = self._render(checked, prompt=False, tools=tools)
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
                begin, end = self._answer_span(checked, index, whole, tools)
                add(begin, learn=False)
                add(end, learn=is_learnt(message))
        add(len(whole), learn=False)
        return ids, mask

    def _answer_span(
        self, messages: Sequence[Message], index: int, whole: str, tools: Sequence[Any] | None
    ) -> tuple[int, int]:
        """Where the answer in `messages[index]` begins in the rendered dialogue, and where its end marker ends."""
        before = self._render(messages[:index], prompt=True, tools=tools) if index else ""
        until = self._render(messages[: index + 1], prompt=False, tools=tools)
        if not (whole.startswith(until) and until.startswith(before)):
            raise InputError(
                f"messages[{index}]: the tokenizer's chat template writes this turn differently once it is past, so "
                "what is learnt cannot be told; choose a built-in template"
            )
        marked = until.rstrip()
        ends_in_marker = any(marked.endswith(text) for text in self._control)
        return len(before), len(marked) if ends_in_marker and len(marked) >= len(before) else len(until)

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
        """InputError for tools, calls and results that the template leaves out, or writes as something else."""
        if not tools and not speaks_of_tools(messages):
            return
        lacks = [what for what, there in self._tool_support.items() if not there]
        used = {
            "tools": bool(tools),
            "tool_calls": any("tool_calls" in message for message in messages),
            "the role tool": any(message["role"] == TOOL for message in messages),
        }
        for what in lacks:
            if used[what]:
                raise InputError(f"tools: the tokenizer's chat template has no place for {what}; leave such items out")

    @cached_property
    def _tool_support(self) -> dict[str, bool]:
        """Which of tools, their calls and their results the template writes, each as nothing else."""
        question = {"role": "user", "content": "Question"}
        call = {"id": "callprobe", "type": "function", "function": {"name": _PROBE, "arguments": {"of": _PROBE}}}
        calls: list[Message] = [{"role": "assistant", "content": c, "tool_calls": [call]} for c in (None, "")]
        plain: Message = {"role": "assistant", "content": "Answer"}
        tool = {"type": "function", "function": {"name": _PROBE, "description": _PROBE, "parameters": {}}}
        result = {"content": _PROBE, "tool_call_id": "callprobe", "name": "f"}

        def text(*messages: Message, tools: Sequence[Any] | None = None) -> str:
            try:
                return self._render(messages, prompt=False, tools=tools)
            except InputError:
                return ""

        def tells_results(said: Message) -> bool:
            written, *others = (text(question, said, {"role": r, **result}) for r in (TOOL, "user", "assistant"))
            return _PROBE in written.replace(text(question, said), "") and written not in others

        return {
            "tools": _PROBE in text(question, tools=[tool]),
            "tool_calls": any(_PROBE in text(question, said) for said in calls),
            "the role tool": any(tells_results(said) for said in (*calls, plain)),
        }

    def _space_before_reply(self) -> str:
        question = {"role": "user", "content": _PROBE}
        try:
            prompt = self._render([question], prompt=True)
            whole = self._render([question, {"role": "assistant", "content": _PROBE}], prompt=False)
        except InputError:
            return ""
        before, found, _ = whole.removeprefix(prompt).partition(_PROBE)
        return before if found and whole.startswith(prompt) and before.isspace() else ""

    def _guarded(self, said: Any) -> tuple[Any, str]:
        """Messages (and tools) with a guard character inside every control string of their texts, and that character.

        The guard occurs nowhere else, and `_ids` takes it out again. It is "" where no text holds a control string.
        """
        contents = "".join(_texts(said))
        if not any(text in contents for text in self._control):
            return said, ""
        guard = next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in contents)
        control = re.compile("|".join(map(re.escape, self._control)))
        return _changed(said, lambda text: control.sub(lambda m: m[0][0] + guard + m[0][1:], text)), guard

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

    def _render(self, messages: Sequence[Message], prompt: bool, tools: Sequence[Any] | None = None) -> str:
        try:
            return self._template.render(
                messages=[{key: value for key, value in m.items() if key != "weight"} for m in messages],
                tools=tools or None,
                add_generation_prompt=prompt,
                **self._tokenizer.template_variables,
            )
        except InputError:
            raise
        except Exception as error:  # the template is somebody else's program and may raise anything
            message = f"template: the tokenizer's chat template cannot write these messages ({error})"
            raise InputError(message) from error


def _texts(value: Any) -> Iterator[str]:
    """Every text in plain values, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from (*_texts(key), *_texts(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Plain values with every text changed. No role and no key of a message is a control string."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(inner, change) for key, inner in value.items()}
    return type(value)(_changed(v, change) for v in value) if isinstance(value, list | tuple) else value


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
