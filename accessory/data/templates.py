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

    def turns(self, messages: Sequence[Message], tokenizer: Tokenizer | None) -> list[Part]:
        system, rest = split_system(messages, ALPACA_PREAMBLE)
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

    def text(self, messages: Iterable[Message], *, prompt: bool = False) -> str:
        parts = self._parts(read_messages(messages), None, prompt)
        return BOS + "".join(" " + part.text if part.opens else part.text for part in parts)

    def turns(self, messages: Sequence[Message], tokenizer: Tokenizer | None) -> list[Part]:
        system, rest = split_system(messages)
        control = tokenizer is not None and "[INST]" in tokenizer.special_tokens
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


class ChatMLTemplate(PartsTemplate):
    """<|im_start|>role, newline, content, <|im_end|>, newline. The model learns each answer and <|im_end|>."""

    name = "chatml"
    stop_strings = ("<|im_end|>", "<|im_start|>")
    strict = False

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


def get_template(name: str | None, tokenizer: Tokenizer | None = None) -> Template:
    """The template called `name`, one of `template_names.TEMPLATES`.

    "tokenizer" is the tokenizer's own chat template. None is that template where the tokenizer has one, else "default".
    Raises InputError for an unknown name, and for "tokenizer" where the tokenizer has no template.
    """
    own = tokenizer.chat_template if tokenizer is not None else None
    if name is None:
        name = OWN if own is not None else DefaultTemplate.name
    if name == OWN:
        if tokenizer is None or own is None:
            where = "no tokenizer was given" if tokenizer is None else f"{tokenizer.path} comes without one"
            raise InputError(f"template: {OWN!r} is the tokenizer's own chat template, but {where}")
        return TokenizerTemplate(own, tokenizer)
    if not isinstance(name, str) or name not in TEMPLATE_CLASSES:
        raise InputError(f"template: got {name!r}, but it must be one of {', '.join(TEMPLATES)}")
    return TEMPLATE_CLASSES[name]()
