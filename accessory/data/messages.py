"""The messages of a dialogue, read from the spellings that people use, and the order that they must have."""

from __future__ import annotations

import json
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


TOOL = "tool"  # the role of what a tool answers


def read_messages(turns: Iterable[Message] | Mapping[str, Any], *, training: bool = False) -> list[dict[str, Any]]:
    """Messages as `[{"role": "system"|"user"|"assistant", "content": text}]`.

    Four spellings are read: that list itself, OpenAI's content as a list of text parts, the original's
    `[{"from": "human"|"gpt"|"assistant", "value": text}]`, and an object that holds such a list under "messages" or
    "conversations". Raises InputError naming the message and what is wrong with it.

    training: read what only training takes, too: an assistant's `weight`, 0 or 1, and its `tool_calls` (then the
    content may be None), and messages of the role "tool". Arguments of calls that are JSON text become objects.
    """
    roles = {**_ROLES, TOOL: TOOL} if training else _ROLES
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
        role = roles.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise InputError(f"{where}: unknown role {name!r}; known are {', '.join(roles)}")
        content = turn.get("content", turn.get("value"))
        more = _for_training(turn, role, where) if training else {}
        calls = content is None and "tool_calls" in more
        messages.append({"role": role, "content": None if calls else _text_of(content, where), **more})
    if not messages:
        raise InputError("messages: the list is empty; give at least one message")
    return messages


def _text_of(content: object, where: str) -> str:
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(str(p.get("text", "")) for p in content)
    if not isinstance(content, str):
        raise InputError(f"{where}: content: got {content!r:.80}, but it must be text")
    return content


def _for_training(turn: Message, role: str, where: str) -> dict[str, Any]:
    """What a message has beside role and content. Keys that are null are absent."""
    given = {key: turn[key] for key in ("weight", "tool_calls", "tool_call_id", "name") if turn.get(key) is not None}
    if role == TOOL:
        return {key: given[key] for key in ("tool_call_id", "name") if key in given}
    if role != "assistant":
        return {}
    weight = given.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise InputError(f"{where}: weight: got {weight!r:.60}, but it must be 0, for a turn that is not learnt, or 1")
    calls = given.get("tool_calls", [])
    if not isinstance(calls, list):
        raise InputError(f"{where}: tool_calls: got {calls!r:.60}, but it must be a list of calls")
    told: dict[str, Any] = {} if weight else {"weight": 0}
    return told | (
        {"tool_calls": [_call(c, f"{where}: tool_calls[{n}]") for n, c in enumerate(calls)]} if calls else {}
    )


def _call(call: object, where: str) -> dict[str, Any]:
    """A call as templates read it: its arguments are an object, as transformers has them. OpenAI's are JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}: got {call!r:.60}, but it must have function, with name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise InputError(
            f"{where}: arguments: got {function.get('arguments')!r:.60}, but it must be an object, or its JSON"
        )
    return {**call, "function": {**function, "arguments": arguments}}


def is_learnt(message: Message) -> bool:
    """Whether a model learns a message: an assistant's, unless its weight is 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def speaks_of_tools(messages: Iterable[Message]) -> bool:
    return any(message["role"] == TOOL or "tool_calls" in message for message in messages)


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
    """Raise InputError for an assistant's turn that is empty or blank: of it, a model would learn only its end.

    A turn that calls tools, and one that is not learnt, may be empty.
    """
    for index, message in enumerate(messages):
        if is_learnt(message) and "tool_calls" not in message and not message["content"].strip():
            raise InputError(f"messages[{index}]: there is nothing to learn: the assistant's turn is empty")


def split_system(messages: Sequence[Message], otherwise: str = "") -> tuple[str, Sequence[Message]]:
    """The text of the leading system message (`otherwise` without one), and the messages after it."""
    if messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return otherwise, messages
