"""The built-in dialogue templates, a class each, and `get_template`, which finds a template by its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from accessory.data.chat_template import TokenizerTemplate
from accessory.data.messages import Message, read_messages, split_system
from accessory.data.system_prompt import ALPACA_PREAMBLE
from accessory.data.template_base import BOS, EOS, Part, PartsTemplate, Template
from accessory.data.template_names import OWN, TEMPLATES
from accessory.data.tokenizer import Tokenizer
from accessory.errors import InputError


class DefaultTemplate(PartsTemplate):
    """The original project's dialogue. The model learns each answer, with the newline and "###" that end it.

    White space at both ends of a turn is left out, as the original leaves it out of what it trains on.
    """

    name = "default"
    stop_strings = ("\n###",)
    reply_space = " "
    system = (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    )
    source = """\
{{- system + '\\n\\n###' -}}
{%- for message in turns -%}
    {{- (' Human: ' if message['role'] == 'user' else ' Assistant: ') + (message['content'] | trim) + '\\n###' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- ' Assistant:' -}}
{%- endif -%}
"""

    def turns(self, messages: Sequence[Message], tokenizer: Tokenizer | None) -> list[Part]:
        system, rest = split_system(messages, self.system)
        parts = [Part(f"{system}\n\n###")]
        for message in rest:
            content = message["content"].strip()
            if message["role"] == "user":
                parts.append(Part(f" Human: {content}\n###"))
            else:
                parts += [*self.header(rest), Part(f" {content}\n###", learn=True)]
        return parts

    def header(self, messages: Sequence[Message]) -> list[Part]:
        return [Part(" Assistant:")]


class AlpacaTemplate(PartsTemplate):
    """Alpaca's single turn. Each later turn appends another instruction and response.

    A system message replaces the preamble. The model learns each answer and EOS.
    """

    name = "alpaca"
    stop_strings = ("\n\n### Instruction:", "\n### Instruction:")
    system = ALPACA_PREAMBLE
    source = """\
{{- system -}}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- '\\n\\n### Instruction:\\n' + message['content'] + '\\n\\n### Response:' -}}
    {%- else -%}
        {{- message['content'] -}}{{- eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

    def turns(self, messages: Sequence[Message], tokenizer: Tokenizer | None) -> list[Part]:
        system, rest = split_system(messages, self.system)
        parts = [Part(system)]
        for message in rest:
            if message["role"] == "user":
                parts.append(Part(f"\n\n### Instruction:\n{message['content']}\n\n### Response:"))
            else:
                parts += [Part(message["content"], learn=True), Part(EOS, learn=True, marker=True)]
        return parts

    def header(self, messages: Sequence[Message]) -> list[Part]:
        return []


class MistralTemplate(PartsTemplate):
    """Mixtral-Instruct's dialogue, with the ids that mistral-common's instruct tokenizers give.

    Where "[INST]" is text (8x7B) these are the ids of its v1, where it is a control token (8x22B) those of its v3. The
    model learns each answer and EOS.
    """

    name = "mistral"
    reply_space = " "
    always_bos = True
    source = """\
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- ' [INST] ' + (system + '\\n\\n' if system and loop.first else '') + message['content'] + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + message['content'] -}}{{- eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
    control_source = """\
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {%- set bears = system and loop.index0 + 2 >= turns | length -%}
        {{- '[INST] ' + (system + '\\n\\n' if bears else '') + message['content'] + '[/INST]' -}}
    {%- else -%}
        {{- ' ' + message['content'].rstrip(' ') -}}{{- eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""  # where "[INST]" is a control token

    def text(self, messages: Iterable[Message], *, prompt: bool = False) -> str:
        parts = self._parts(read_messages(messages), None, prompt)
        return BOS + "".join(" " + part.text if part.opens else part.text for part in parts)

    def turns(self, messages: Sequence[Message], tokenizer: Tokenizer | None) -> list[Part]:
        system, rest = split_system(messages)
        control = tokenizer is not None and _has_control(tokenizer)
        users = [index for index, message in enumerate(rest) if message["role"] == "user"]
        bearer = users[-1] if control else users[0]  # the turn that holds the system prompt: v1 the first, v3 the last
        parts = []
        for index, message in enumerate(rest):
            content = message["content"]
            if message["role"] == "user":
                content = f"{system}\n\n{content}" if system and index == bearer else content
                if control:
                    parts += [Part("[INST]", marker=True), Part(content, opens=True), Part("[/INST]", marker=True)]
                else:
                    parts.append(Part(f"[INST] {content} [/INST]", opens=True))
            else:
                content = content.rstrip(" ") if control else content
                parts += [Part(content, learn=True, opens=True), Part(EOS, learn=True, marker=True)]
        return parts

    def header(self, messages: Sequence[Message]) -> list[Part]:
        return []

    def _source_for(self, tokenizer: Tokenizer) -> str:
        return self.control_source if _has_control(tokenizer) else self.source


def _has_control(tokenizer: Tokenizer) -> bool:
    return "[INST]" in tokenizer.special_tokens


class ChatMLTemplate(PartsTemplate):
    """<|im_start|>role, newline, content, <|im_end|>, newline. The model learns each answer and <|im_end|>."""

    name = "chatml"
    stop_strings = ("<|im_end|>", "<|im_start|>")
    strict = False
    source = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

    def turns(self, messages: Sequence[Message], tokenizer: Tokenizer | None) -> list[Part]:
        parts = []
        for message in messages:
            learn = message["role"] == "assistant"
            parts += self._open(message["role"])
            parts += [Part(message["content"], learn), Part("<|im_end|>", learn, marker=True), Part("\n")]
        return parts

    def header(self, messages: Sequence[Message]) -> list[Part]:
        return self._open("assistant")

    def _open(self, role: str) -> list[Part]:
        return [Part("<|im_start|>", marker=True), Part(f"{role}\n")]

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        end = tokenizer.special_tokens.get("<|im_end|>")
        return tokenizer.stop_ids | (frozenset() if end is None else {end})


class PlainTemplate(PartsTemplate):
    """No template: the texts as they are. An answer follows its question at once; a newline precedes the next question.

    The model learns the answers, and EOS after the last one.
    """

    name = "none"
    strict = False
    source = """\
{%- for message in messages -%}
    {%- if not loop.first and not (message['role'] == 'assistant' and loop.previtem['role'] == 'user') -%}
        {{- '\\n' -}}
    {%- endif -%}
    {{- message['content'] -}}
{%- endfor -%}
{%- if messages[-1]['role'] == 'assistant' -%}
    {{- eos_token -}}
{%- endif -%}
"""

    def turns(self, messages: Sequence[Message], tokenizer: Tokenizer | None) -> list[Part]:
        parts = []
        for index, message in enumerate(messages):
            learn = message["role"] == "assistant"
            if index and not (learn and messages[index - 1]["role"] == "user"):
                parts.append(Part("\n"))
            parts.append(Part(message["content"], learn))
        if messages[-1]["role"] == "assistant":
            parts.append(Part(EOS, learn=True, marker=True))
        return parts

    def header(self, messages: Sequence[Message]) -> list[Part]:
        return []


TEMPLATE_CLASSES: dict[str, type[PartsTemplate]] = {
    t.name: t for t in (DefaultTemplate, AlpacaTemplate, MistralTemplate, ChatMLTemplate, PlainTemplate)
}


def usual_name(tokenizer: Tokenizer | None) -> str:
    """The template of a tokenizer's model where none is named: its own, else "default".

    Its own has a built-in template's name where it is that template's Jinja.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        return DefaultTemplate.name
    own = tokenizer.chat_template.strip()
    return next((name for name, t in TEMPLATE_CLASSES.items() if t().jinja(tokenizer).strip() == own), OWN)


def get_template(name: str | None, tokenizer: Tokenizer | None = None) -> Template:
    """The template called `name`, one of `template_names.TEMPLATES`.

    None is `usual_name`. "tokenizer" is the tokenizer's own chat template. Where that is the Jinja of a built-in one,
    it is the built-in one, so that a finetuned model is asked with the very ids that it learnt from. Raises InputError
    for an unknown name, and for "tokenizer" where the tokenizer has no template.
    """
    if name is None or (name == OWN and tokenizer is not None and tokenizer.chat_template is not None):
        name = usual_name(tokenizer)
    if name == OWN:
        own = tokenizer.chat_template if tokenizer is not None else None
        if tokenizer is None or own is None:
            where = "no tokenizer was given" if tokenizer is None else f"{tokenizer.path} comes without one"
            raise InputError(f"template: {OWN!r} is the tokenizer's own chat template, but {where}")
        return TokenizerTemplate(own, tokenizer)
    if not isinstance(name, str) or name not in TEMPLATE_CLASSES:
        raise InputError(f"template: got {name!r}, but it must be one of {', '.join(TEMPLATES)}")
    return TEMPLATE_CLASSES[name]()
