"""What every dialogue template can do: `Template`. How the built-in ones turn parts of text into ids: `PartsTemplate`.

A built-in template writes a dialogue as a list of `Part`s. It says of each part, while it writes it, whether the model
learns it; nobody searches the finished text for answers. A model learns every assistant turn with its end marker, and
nothing else. A prompt is made of the same parts, up to the answer, and encoded in the same pieces. So the ids of a
prompt are exactly the beginning of the ids that training sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from accessory.data.messages import Message, check_alternation, check_ends_with_user, read_messages
from accessory.data.tokenizer import Tokenizer

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
    def encode(self, messages: Iterable[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        """The ids of a whole dialogue, and for each id whether the model learns it."""

    @abstractmethod
    def prompt_ids(self, messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
        """The ids after which the model writes the assistant's next turn."""

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
    """

    text: str
    learn: bool = False
    marker: bool = False
    opens: bool = False


class PartsTemplate(Template):
    """A template whose subclasses write turns as parts."""

    strict = True  # user and assistant take turns, the user first; one system message may come before them

    @abstractmethod
    def turns(self, messages: Sequence[Message], tokenizer: Tokenizer | None) -> list[Part]:
        """All messages as parts."""

    @abstractmethod
    def header(self, messages: Sequence[Message]) -> list[Part]:
        """What follows the messages when the assistant is to speak."""

    def text(self, messages: Iterable[Message], *, prompt: bool = False) -> str:
        return "".join(part.text for part in self._parts(messages, None, prompt))

    def encode(self, messages: Iterable[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        return self._ids(self._parts(messages, tokenizer, prompt=False), tokenizer)

    def prompt_ids(self, messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
        return self._ids(self._parts(messages, tokenizer, prompt=True), tokenizer)[0]

    def _parts(self, messages: Iterable[Message], tokenizer: Tokenizer | None, prompt: bool) -> list[Part]:
        checked = read_messages(messages)
        if self.strict:
            check_alternation(checked, self.name)
        if not prompt:
            return self.turns(checked, tokenizer)
        check_ends_with_user(checked)
        return self.turns(checked, tokenizer) + self.header(checked)

    def _ids(self, parts: Iterable[Part], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        bos = tokenizer.bos_id if self.begins_with_bos(tokenizer) else None
        ids: list[int] = [] if bos is None else [bos]
        mask = [False] * len(ids)
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
            elif not (part.marker and part.text == EOS):  # a tokenizer without EOS gets nothing in its place
                run += part.text
        close_run()
        return ids, mask


def _marker_id(text: str, tokenizer: Tokenizer) -> int | None:
    return tokenizer.eos_id if text == EOS else tokenizer.special_tokens.get(text)
