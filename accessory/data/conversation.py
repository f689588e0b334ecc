"""Dialogue templates: from messages to text, and to token ids with a mask of what a model learns from them.

A template writes a dialogue as parts (`Part`). Labels are laid while the parts are written, turn by turn, never by
searching the finished text for answers: every assistant turn is learnt, its end marker included, and nothing else is.
The prompt for generation is the same parts up to an assistant's answer, encoded in the same pieces, so the ids of a
prompt are exactly the beginning of the ids that training sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accessory.data.system_prompt import ALPACA_PREAMBLE
from accessory.data.tokenizer import Tokenizer
from accessory.errors import InputError

Message = Mapping[str, Any]

# Names of roles in circulation -> ours.
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

_BOS, _EOS = "<s>", "</s>"  # how text shows them; as ids they are the tokenizer's own


@dataclass(frozen=True)
class Part:
    """A piece of a dialogue's text. Neighbours with the same `learn` are encoded together.

    marker: one control token where the tokenizer has it, else characters. opens: encoded apart from what is before,
    as a text of its own (SentencePiece then puts a space before its first word).
    """

    text: str
    learn: bool = False
    marker: bool = False
    opens: bool = False


def read_messages(turns: Iterable[Message] | Mapping[str, Any]) -> list[dict[str, str]]:
    """Messages as `[{"role": "system"|"user"|"assistant", "content": text}]`.

    Takes those themselves, OpenAI's lists of text parts as content, the original's
    `[{"from": "human"|"gpt"|"assistant", "value": text}]`, and an object holding either under "messages" or
    "conversations". Raises InputError naming the message and what is wrong with it.
    """
    if isinstance(turns, Mapping):
        inner = turns.get("messages", turns.get("conversations"))
        if inner is None:
            raise InputError(f"messages: found neither messages nor conversations among {', '.join(map(str, turns))}")
        turns = inner
    if isinstance(turns, str) or not isinstance(turns, Iterable):
        raise InputError(f"messages: got a {type(turns).__name__}, but it must be a list of objects")
    messages = []
    for index, turn in enumerate(turns):
        where = f"messages[{index}]"
        if not isinstance(turn, Mapping):
            raise InputError(f"{where}: got a {type(turn).__name__}, but it must be an object with role and content")
        name = turn.get("role", turn.get("from"))
        role = _ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise InputError(f"{where}: unknown role {name!r}; known are {', '.join(_ROLES)}")
        messages.append({"role": role, "content": _text_of(turn.get("content", turn.get("value")), where)})
    if not messages:
        raise InputError("messages: the list is empty; give at least one message")
    return messages


def _text_of(content: object, where: str) -> str:
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(str(p.get("text", "")) for p in content)
    if not isinstance(content, str):
        raise InputError(f"{where}: content: got {content!r:.80}, but it must be text")
    return content


class Template(ABC):
    """How a dialogue is written. `reply_space` is what the template itself writes before an answer's first word."""

    name: str
    stop_strings: tuple[str, ...] = ()
    reply_space: str = ""

    @abstractmethod
    def text(self, messages: Iterable[Message], *, prompt: bool = False) -> str:
        """The dialogue as a reader sees it; `prompt`: with the header after which the assistant speaks."""

    @abstractmethod
    def encode(self, messages: Iterable[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        """The ids of a whole dialogue, and for each whether it is learnt."""

    @abstractmethod
    def prompt_ids(self, messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
        """The ids after which the model writes the assistant's next turn."""

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The ids that end an answer."""
        return tokenizer.stop_ids

    def reply(self, text: str) -> str:
        """A generated answer as it belongs into the next round's messages: without the template's own space."""
        return text.removeprefix(self.reply_space)


class PartsTemplate(Template):
    """A template built in: subclasses write turns as parts."""

    strict = True  # turns alternate, beginning with the user; one system message may come first
    always_bos = False

    @abstractmethod
    def turns(self, messages: Sequence[Message], tokenizer: Tokenizer | None) -> list[Part]:
        """All messages as parts."""

    @abstractmethod
    def header(self, messages: Sequence[Message]) -> list[Part]:
        """What follows the messages when the assistant is to speak."""

    def _parts(self, messages: Iterable[Message], tokenizer: Tokenizer | None, prompt: bool) -> list[Part]:
        checked = read_messages(messages)
        if self.strict:
            check_alternation(checked, self.name)
        if not prompt:
            return self.turns(checked, tokenizer)
        if checked[-1]["role"] == "assistant":
            raise InputError("messages: the last one is the assistant's; a prompt must end with the user's")
        return self.turns(checked, tokenizer) + self.header(checked)

    def text(self, messages: Iterable[Message], *, prompt: bool = False) -> str:
        return "".join(part.text for part in self._parts(messages, None, prompt))

    def encode(self, messages: Iterable[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        return self._ids(self._parts(messages, tokenizer, prompt=False), tokenizer)

    def prompt_ids(self, messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
        return self._ids(self._parts(messages, tokenizer, prompt=True), tokenizer)[0]

    def _ids(self, parts: Iterable[Part], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        if tokenizer.bos_id is not None and (tokenizer.add_bos or self.always_bos):
            ids, mask = [tokenizer.bos_id], [False]
        first = len(ids)
        run, run_opens, run_learn = "", False, False

        def close_run() -> None:
            new = tokenizer.encode(run, bos=False, prefix=run_opens or len(ids) == first) if run else []
            ids.extend(new)
            mask.extend([run_learn] * len(new))

        for part in parts:
            marker = _marker_id(part.text, tokenizer) if part.marker else None
            if marker is not None or part.opens or part.learn != run_learn:
                close_run()
                run, run_opens, run_learn = "", part.opens, part.learn
            if marker is not None:
                ids.append(marker)
                mask.append(part.learn)
            elif not (part.marker and part.text == _EOS):  # a tokenizer without EOS has nothing to say here
                run += part.text
        close_run()
        return ids, mask


def _marker_id(text: str, tokenizer: Tokenizer) -> int | None:
    return tokenizer.eos_id if text == _EOS else tokenizer.special_tokens.get(text)


def check_alternation(messages: Sequence[Message], template: str) -> None:
    """InputError unless an optional system message is followed by user and assistant in turn."""
    turns = list(messages[1:] if messages[0]["role"] == "system" else messages)
    offset = len(messages) - len(turns)
    if not turns:
        raise InputError("messages: there is only a system message; give one of the user's too")
    for index, message in enumerate(turns):
        wanted = "assistant" if index % 2 else "user"
        if message["role"] != wanted:
            raise InputError(
                f"messages[{index + offset}]: the role is {message['role']}, but the template {template!r} wants user "
                f"and assistant in turn (after one system message at most), so here {wanted}"
            )


def split_system(messages: Sequence[Message], otherwise: str = "") -> tuple[str, Sequence[Message]]:
    """The leading system message's text, and the messages behind it."""
    if messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return otherwise, messages


class DefaultTemplate(PartsTemplate):
    """The original's dialogue. Learnt: the answer with the newline and "###" that end it."""

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
            if message["role"] == "user":
                parts.append(Part(f" Human: {message['content']}\n###"))
            else:
                parts += [*self.header(rest), Part(f" {message['content']}\n###", learn=True)]
        return parts

    def header(self, messages: Sequence[Message]) -> list[Part]:
        return [Part(" Assistant:")]


class AlpacaTemplate(PartsTemplate):
    """Alpaca's single turn; later turns append another instruction and response. A system message takes the preamble's
    place. Learnt: the answer and EOS."""

    name = "alpaca"
    stop_strings = ("\n\n### Instruction:", "\n### Instruction:")

    def turns(self, messages: Sequence[Message], tokenizer: Tokenizer | None) -> list[Part]:
        system, rest = split_system(messages, ALPACA_PREAMBLE)
        parts = [Part(system)]
        for message in rest:
            if message["role"] == "user":
                parts.append(Part(f"\n\n### Instruction:\n{message['content']}\n\n### Response:"))
            else:
                parts += [Part(message["content"], learn=True), Part(_EOS, learn=True, marker=True)]
        return parts

    def header(self, messages: Sequence[Message]) -> list[Part]:
        return []


class MistralTemplate(PartsTemplate):
    """Mixtral-Instruct as mistral-common's instruct tokenizers encode it: v1 where "[INST]" is text (8x7B), v3 where it
    is a control token (8x22B). Learnt: the answer and EOS."""

    name = "mistral"
    reply_space = " "
    always_bos = True

    def text(self, messages: Iterable[Message], *, prompt: bool = False) -> str:
        parts = self._parts(messages, None, prompt)
        return _BOS + "".join(" " + part.text if part.opens else part.text for part in parts)

    def turns(self, messages: Sequence[Message], tokenizer: Tokenizer | None) -> list[Part]:
        system, rest = split_system(messages)
        control = tokenizer is not None and "[INST]" in tokenizer.special_tokens
        users = [index for index, message in enumerate(rest) if message["role"] == "user"]
        bearer = users[-1] if control else users[0]  # v1 puts the system prompt into the first turn, v3 into the last
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
                parts += [Part(content, learn=True, opens=True), Part(_EOS, learn=True, marker=True)]
        return parts

    def header(self, messages: Sequence[Message]) -> list[Part]:
        return []


class ChatMLTemplate(PartsTemplate):
    """<|im_start|>role, newline, content, <|im_end|>, newline. Learnt: the answer and <|im_end|>."""

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
    """No template: the texts as they are, an answer right behind its question, a newline before the next one.
    Learnt: the answers, and EOS behind the last."""

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
            parts.append(Part(_EOS, learn=True, marker=True))
        return parts

    def header(self, messages: Sequence[Message]) -> list[Part]:
        return []


_TEMPLATES: dict[str, type[PartsTemplate]] = {
    t.name: t for t in (DefaultTemplate, AlpacaTemplate, MistralTemplate, ChatMLTemplate, PlainTemplate)
}
OWN = "tokenizer"
TEMPLATES = (*_TEMPLATES, OWN)


def get_template(name: str | None, tokenizer: Tokenizer | None = None) -> Template:
    """The template of that name; "tokenizer" is the tokenizer's own chat template, and None that one if there is one,
    else "default". Raises InputError for an unknown name, and for "tokenizer" when there is none."""
    own = tokenizer.chat_template if tokenizer is not None else None
    if name is None:
        name = OWN if own is not None else DefaultTemplate.name
    if name == OWN:
        from accessory.data.chat_template import TokenizerTemplate

        if tokenizer is None or own is None:
            where = "no tokenizer was given" if tokenizer is None else f"{tokenizer.path} comes without one"
            raise InputError(f"template: {OWN!r} is the tokenizer's own chat template, but {where}")
        return TokenizerTemplate(own, tokenizer)
    if not isinstance(name, str) or name not in _TEMPLATES:
        raise InputError(f"template: got {name!r}, but it must be one of {', '.join(TEMPLATES)}")
    return _TEMPLATES[name]()


class Conversation:
    """A dialogue in progress: messages and the template that writes them."""

    def __init__(self, template: Template | str = "default", system: str | None = None) -> None:
        self.template = get_template(template) if isinstance(template, str) else template
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def add(self, role: str, content: str) -> Conversation:
        """Append a message; give a generated answer as `template.reply(answer)`."""
        self.messages += read_messages([{"role": role, "content": content}])
        return self

    def text(self, *, prompt: bool = False) -> str:
        return self.template.text(self.messages, prompt=prompt)

    def prompt_ids(self, tokenizer: Tokenizer) -> list[int]:
        return self.template.prompt_ids(self.messages, tokenizer)

    def encode(self, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        return self.template.encode(self.messages, tokenizer)
