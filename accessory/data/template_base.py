"""What every dialogue template can do: `Template`. How the built-in ones turn parts of text into ids: `PartsTemplate`.

A built-in template writes a dialogue as a list of `Part`s. It says of each part, while it writes it, whether the model
learns it; nobody searches the finished text for answers. A model learns every assistant turn with its end marker, and
nothing else. A prompt is made of the same parts, up to the answer, and encoded in the same pieces. So the ids of a
prompt are exactly the beginning of the ids that training sees.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from accessory.data.messages import (
    Message,
    check_alternation,
    check_ends_with_user,
    is_learnt,
    read_messages,
    speaks_of_tools,
)
from accessory.data.tokenizer import Tokenizer
from accessory.errors import InputError

# Jinja that splits the messages into `system` and `turns`, and refuses the orders that `check_alternation` refuses.
_OPENING = """\
{%- set system = SYSTEM -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- if not turns -%}
    {{- raise_exception('there is only a system message') -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('user and assistant must take turns, after one system message at most') -}}
    {%- endif -%}
{%- endfor -%}
"""
BOS, EOS = "<s>", "</s>"  # how text shows them; their ids are the tokenizer's own


class Template(ABC):
    """How a dialogue becomes text and ids.

    `stop_strings` end an answer. `reply_space` is the white space that the template itself writes before an answer.
    """

    name: str
    stop_strings: tuple[str, ...] = ()
    reply_space: str = ""
    always_bos = False  # whether ids begin with BOS even where the tokenizer's texts do not

    @abstractmethod
    def text(self, messages: Iterable[Message], *, prompt: bool = False) -> str:
        """The dialogue as a reader sees it. With `prompt` it ends with the header of the assistant's next turn."""

    @abstractmethod
    def encode(
        self, messages: Iterable[Message], tokenizer: Tokenizer, tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[bool]]:
        """The ids of a whole dialogue, and for each id whether the model learns it.

        tools: those that are offered to the assistant. InputError where the template has no place for tools.
        """

    @abstractmethod
    def prompt_ids(self, messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
        """The ids after which the model writes the assistant's next turn."""

    @abstractmethod
    def jinja(self, tokenizer: Tokenizer) -> str:
        """The template as Jinja, for readers of `chat_template.jinja`: BOS where the ids begin with it, then `text`."""

    def begins_with_bos(self, tokenizer: Tokenizer) -> bool:
        """Whether the ids of every dialogue must begin with BOS."""
        return tokenizer.bos_id is not None and (tokenizer.add_bos or self.always_bos)

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The ids that end an answer."""
        return tokenizer.stop_ids

    def reply(self, text: str) -> str:
        """A generated answer as the next round's messages need it: without the template's own space."""
        return text.removeprefix(self.reply_space)


@dataclass(frozen=True)
class Part:
    """A piece of a dialogue's text. Neighbours with the same `learn` are encoded together.

    marker: the text is one control token where the tokenizer has it, else characters. opens: the part is encoded apart
    from the text before it, as if a new text began here (SentencePiece then puts a space before its first word).
    muted: what `learn` marks is not learnt after all, though it is encoded in the same way.
    """

    text: str
    learn: bool = False
    marker: bool = False
    opens: bool = False
    muted: bool = False


class PartsTemplate(Template):
    """A template whose subclasses write turns as parts."""

    strict = True  # user and assistant take turns, the user first; one system message may come before them
    source: str  # what `turns` and `header` write, as Jinja; where `strict`, of the variables `system` and `turns`
    system = ""  # what stands for a system message where there is none

    @abstractmethod
    def turns(self, messages: Sequence[Message], tokenizer: Tokenizer | None) -> list[Part]:
        """All messages as parts."""

    @abstractmethod
    def header(self, messages: Sequence[Message]) -> list[Part]:
        """What follows the messages when the assistant is to speak."""

    def text(self, messages: Iterable[Message], *, prompt: bool = False) -> str:
        return "".join(part.text for part in self._parts(read_messages(messages), None, prompt))

    def jinja(self, tokenizer: Tokenizer) -> str:
        begin = "{{- bos_token -}}\n" if self.begins_with_bos(tokenizer) else ""
        opening = _OPENING.replace("SYSTEM", json.dumps(self.system)) if self.strict else ""
        return begin + opening + self._source_for(tokenizer)

    def _source_for(self, tokenizer: Tokenizer) -> str:
        return self.source

    def encode(
        self, messages: Iterable[Message], tokenizer: Tokenizer, tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[bool]]:
        checked = read_messages(messages, training=True)
        if tools or speaks_of_tools(checked):
            raise InputError(
                f"tools: the template {self.name!r} has no place for tools, their calls and their results; "
                "template: tokenizer, the tokenizer's own, may have one"
            )
        return self._ids(self._weighed(self._parts(checked, tokenizer, prompt=False), checked), tokenizer)

    def prompt_ids(self, messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
        return self._ids(self._parts(read_messages(messages), tokenizer, prompt=True), tokenizer)[0]

    def _parts(self, checked: list[dict[str, Any]], tokenizer: Tokenizer | None, prompt: bool) -> list[Part]:
        if self.strict:
            check_alternation(checked, self.name)
        if not prompt:
            return self.turns(checked, tokenizer)
        check_ends_with_user(checked)
        return self.turns(checked, tokenizer) + self.header(checked)

    def _weighed(self, parts: list[Part], messages: Sequence[Message]) -> list[Part]:
        """The parts, muted where they are of a turn of weight 0. Each assistant's turn is a run of learnt parts."""
        weights = [is_learnt(message) for message in messages if message["role"] == "assistant"]
        if all(weights):
            return parts
        runs = [list(run) for learn, run in groupby(range(len(parts)), lambda n: parts[n].learn) if learn]
        if len(runs) != len(weights):
            raise InputError(f"weight: the template {self.name!r} does not write each turn of the assistant by itself")
        muted = {n for run, weight in zip(runs, weights, strict=True) if not weight for n in run}
        return [replace(part, muted=n in muted) for n, part in enumerate(parts)]

    def _ids(self, parts: Iterable[Part], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        bos = tokenizer.bos_id if self.begins_with_bos(tokenizer) else None
        ids: list[int] = [] if bos is None else [bos]
        mask = [False] * len(ids)
        first = len(ids)
        run, run_opens, run_learn, run_muted = "", False, False, False

        def close_run() -> None:
            new = tokenizer.encode(run, bos=False, prefix=run_opens or len(ids) == first) if run else []
            ids.extend(new)
            mask.extend([run_learn and not run_muted] * len(new))

        for part in parts:
            marker = _marker_id(part.text, tokenizer) if part.marker else None
            if marker is not None or part.opens or part.learn != run_learn:
                close_run()
                run, run_opens, run_learn, run_muted = "", part.opens, part.learn, part.muted
            if marker is not None:
                ids.append(marker)
                mask.append(part.learn and not part.muted)
            elif not (part.marker and part.text == EOS):  # a tokenizer without EOS gets nothing in its place
                run += part.text
        close_run()
        return ids, mask


def _marker_id(text: str, tokenizer: Tokenizer) -> int | None:
    return tokenizer.eos_id if text == EOS else tokenizer.special_tokens.get(text)
