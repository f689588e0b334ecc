"""Tools in Mistral's format of version 3, which has control tokens for them: those offered, their calls and results.

    <s>[AVAILABLE_TOOLS] […][/AVAILABLE_TOOLS][INST] question[/INST]
    [TOOL_CALLS] [{"name": …, "arguments": {…}, "id": …}]</s>
    [TOOL_RESULTS] {"content": …, "call_id": …}[/TOOL_RESULTS] answer</s>

Mixtral-8x22B-Instruct speaks it; Mixtral-8x7B's tokenizer has no such tokens. What mistral-common writes is the oracle.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accessory.data.tokenizer import Tokenizer
from accessory.errors import InputError
from accessory.model.writing import Completion
from accessory.server.grammars import WHITE_SPACE
from accessory.server.protocol import ChatMessage, ChatRequest, ImagePart, Tool, ToolChoice

_CONTROL = (
    "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip
_ID = re.compile(r"[a-zA-Z0-9]{9}")  # of a call, as the models were trained


@dataclass(frozen=True)
class Tools:
    """The tools that a request offers. choice: "auto", "required", or the name of one that must be called."""

    tokenizer: Tokenizer
    offered: Sequence[Tool]
    choice: str
    several: bool

    @classmethod
    def of(cls, body: ChatRequest, tokenizer: Tokenizer) -> Tools | None:
        """None for a request without tools. InputError where the tokenizer has no tokens for them."""
        spoken = any(message.role == "tool" or message.tool_calls for message in body.messages)
        if not body.tools and not spoken:
            if body.tool_choice not in (None, "none"):
                raise InputError("tool_choice: there are no tools to choose from; give tools too")
            return None
        missing = [text for text in _CONTROL if text not in tokenizer.special_tokens]
        if missing:
            raise InputError(f"tools: this model's tokenizer has no token {missing[0]}; leave tools out")
        offered = [] if body.tool_choice == "none" else body.tools or []
        chosen = body.tool_choice or "auto"
        choice = chosen.function.name if isinstance(chosen, ToolChoice) else chosen
        if isinstance(chosen, ToolChoice) and choice not in (tool.function.name for tool in offered):
            raise InputError(f"tool_choice: got {choice!r}, but no tool has this name")
        return cls(tokenizer, offered, choice, body.parallel_tool_calls is not False)

    # ----------------------------------------------------------------- what the model reads

    def prompt_ids(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The ids of a dialogue, up to where the model speaks. Control strings in contents stay characters."""
        control, ids = self.tokenizer.special_tokens, [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        end = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        system, turns = _split(messages)
        last = max((n for n, message in enumerate(turns) if message.role == "user"), default=-1)
        for n, message in enumerate(turns):
            if message.role == "user":
                text = _text(message)
                if n == last:
                    text = f"{system}\n\n{text}" if system else text
                    if self.offered:
                        how: Any = {"exclude_none": True, "exclude": {"function": {"strict"}}}
                        listed = self._encode(_json([tool.model_dump(**how) for tool in self.offered]))
                        ids += [control["[AVAILABLE_TOOLS]"], *listed, control["[/AVAILABLE_TOOLS]"]]
                ids += [control["[INST]"], *self._encode(text), control["[/INST]"]]
            elif message.role == "tool":
                result = {"content": _value(_text(message)), "call_id": message.tool_call_id}
                ids += [control["[TOOL_RESULTS]"], *self._encode(_json(result)), control["[/TOOL_RESULTS]"]]
            else:
                if message.content:
                    ids += self._encode(_text(message))
                if message.tool_calls:
                    called = [
                        {"name": c.function.name, "arguments": _value(c.function.arguments), "id": c.id}
                        for c in message.tool_calls
                    ]
                    ids += [control["[TOOL_CALLS]"], *self._encode(_json(called))]
                ids += end
        return ids

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False)

    @property
    def grammar(self) -> str | None:
        """Lark's form of what an answer must be; None where it may be any text."""
        if self.choice == "auto" or not self.offered:
            return None
        functions = [t.function for t in self.offered if self.choice in ("required", t.function.name)]
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": f.name}, "arguments": f.parameters or {"type": "object"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for f in functions
        ]
        most = {} if self.several and self.choice == "required" else {"maxItems": 1}
        schema = {"x-guidance": WHITE_SPACE, "type": "array", "items": {"anyOf": calls}, "minItems": 1, **most}
        return f"start: <[{self.tokenizer.special_tokens['[TOOL_CALLS]']}]> calls\ncalls: %json {json.dumps(schema)}\n"

    # ----------------------------------------------------------------- what the model says

    def said(self, answer: Completion) -> str:
        """What an answer says before it calls a tool: all of it, where it calls none."""
        begin = self._begin(answer)
        if begin is None:
            return answer.text
        called = self._after(answer, begin)
        return answer.text[: len(answer.text) - len(called)] if answer.text.endswith(called) else ""

    def calls(self, answer: Completion) -> list[dict[str, Any]]:
        """The calls of an answer as OpenAI's API gives them; empty where it has none that can be read."""
        begin = self._begin(answer)
        if begin is None:
            return []
        try:
            found = json.loads(self._after(answer, begin))
        except (ValueError, RecursionError):
            return []
        if not isinstance(found, list) or not all(
            isinstance(c, dict) and isinstance(c.get("name"), str) for c in found
        ):
            return []
        return [
            {
                "id": call["id"] if isinstance(call.get("id"), str) and _ID.fullmatch(call["id"]) else _new_id(),
                "type": "function",
                "function": {"name": call["name"], "arguments": _json(call.get("arguments", {}))},
            }
            for call in found
        ]

    def calling(self, answer: Completion) -> bool:
        """Whether the answer so far calls a tool."""
        return self._begin(answer) is not None

    def _begin(self, answer: Completion) -> int | None:
        token = self.tokenizer.special_tokens["[TOOL_CALLS]"]
        return answer.token_ids.index(token) if token in answer.token_ids else None

    def _after(self, answer: Completion, begin: int) -> str:
        ids = [token for token in answer.token_ids[begin + 1 :] if token not in self.tokenizer.stop_ids]
        return self.tokenizer.decode(ids, after=[*answer.token_ids[:begin], *self._encode("x")])


def _split(messages: Sequence[ChatMessage]) -> tuple[str, list[ChatMessage]]:
    """The system messages in front, as one text, and the turns. InputError for an order that the format has not."""
    turns = list(messages)
    system = []
    while turns and turns[0].role in ("system", "developer"):
        system.append(_text(turns.pop(0)))
    allowed = {
        None: ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("tool", "assistant", "user"),
    }
    before: ChatMessage | None = None
    for number, message in enumerate(turns, len(system)):
        wanted = allowed[None if before is None else before.role]
        if message.role not in wanted:
            raise InputError(
                f"messages[{number}]: the role is {message.role}, but here it must be {' or '.join(wanted)}"
            )
        if message.role == "tool":
            if message.tool_call_id is None:
                raise InputError(f"messages[{number}]: tool_call_id: missing; it says which call this is the result of")
            if before is not None and before.role == "assistant" and not before.tool_calls:
                raise InputError(f"messages[{number}]: a tool's result, but the assistant before it called none")
        before = message
    if before is None or before.role == "assistant":
        raise InputError("messages: a prompt must end with a message of the user, or with the result of a tool")
    return "\n\n".join(system), turns


def _text(message: ChatMessage) -> str:
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content if not isinstance(part, ImagePart))
    if content is None:
        raise InputError(f"messages: a message of the {message.role} has no content")
    return content


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _value(text: str) -> Any:
    """A text as JSON where it is that, as mistral-common writes results and arguments."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the latter: thousands of brackets
        return text


def _new_id() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
