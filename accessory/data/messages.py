"""The messages of a dialogue, read from the spellings that people use, and the order that they must have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accessory.errors import InputError

Message = Mapping[str, Any]

# A role's name in other people's files -> our name of it.
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def read_messages(turns: Iterable[Message] | Mapping[str, Any]) -> list[dict[str, str]]:
    """Messages as `[{"role": "system"|"user"|"assistant", "content": text}]`.

    Four spellings are read: that list itself, OpenAI's content as a list of text parts, the original's
    `[{"from": "human"|"gpt"|"assistant", "value": text}]`, and an object that holds such a list under "messages" or
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


def check_alternation(messages: Sequence[Message], template: str) -> None:
    """Raise InputError unless user and assistant take turns, after at most one system message.

    template: the name of the template that wants this order; the message says it.
    """
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


def check_ends_with_user(messages: Sequence[Message]) -> None:
    """Raise InputError where the assistant spoke last: a prompt ends with a message that the assistant answers."""
    if messages[-1]["role"] == "assistant":
        raise InputError("messages: the last one is the assistant's; a prompt must end with the user's")


def check_answers(messages: Sequence[Message]) -> None:
    """Raise InputError for an assistant's turn that is empty or blank: of it, a model would learn only its end."""
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise InputError(f"messages[{index}]: there is nothing to learn: the assistant's turn is empty")


def split_system(messages: Sequence[Message], otherwise: str = "") -> tuple[str, Sequence[Message]]:
    """The text of the leading system message (`otherwise` without one), and the messages after it."""
    if messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return otherwise, messages
