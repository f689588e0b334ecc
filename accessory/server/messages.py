"""/v1/messages: Anthropic's form of a dialogue, translated into a request to /v1/chat/completions and back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from accessory.data.tokenizer import Tokenizer
from accessory.errors import InputError
from accessory.server.jobs import Job, usage_so_far
from accessory.server.protocol import FUNCTION_NAME, MOST_STOPS, Body, ChatRequest, Texts


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None  # has no effect: prompts that begin alike always share pages
    citations: None = None


class ImageSource(Body):
    type: Literal["base64", "url"]
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class ImageBlock(Body):
    type: Literal["image"]
    source: ImageSource
    cache_control: dict[str, Any] | None = None


class ToolUse(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None


class ToolResult(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[TextBlock], Field(fail_fast=True)] = ""
    is_error: bool | None = None  # has no effect: the model reads what the result says
    cache_control: dict[str, Any] | None = None


Block = Annotated[TextBlock | ImageBlock | ToolUse | ToolResult, Field(discriminator="type")]


class Message(Body):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(fail_fast=True)]


class OfferedTool(Body):
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None


class Choice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class MessagesRequest(Body):
    """temperature: at most 1 in this form. NAMES: of fields that /v1/chat/completions calls otherwise."""

    NAMES: ClassVar[dict[str, str]] = {"stop": "stop_sequences"}
    model: str
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)]
    system: str | Annotated[list[TextBlock], Field(fail_fast=True)] | None = None
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    stop_sequences: Annotated[Texts, Field(max_length=MOST_STOPS)] | None = None
    tools: Annotated[list[OfferedTool], Field(fail_fast=True)] | None = None
    tool_choice: Choice | None = None
    metadata: dict[str, Any] | None = None  # has no effect
    service_tier: str | None = None  # has no effect

    def chat(self) -> ChatRequest:
        """The same as a request to /v1/chat/completions. InputError for what has no place there."""
        given = [{"role": "system", "content": _text(self.system)}] if self.system else []
        for number, message in enumerate(self.messages):
            given += _turns(message, number)
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": given,
            "max_tokens": self.max_tokens,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
        }
        if self.tools:
            asked["tools"] = [
                {
                    "type": "function",
                    "function": {"name": t.name, "description": t.description or "", "parameters": t.input_schema},
                }
                for t in self.tools
            ]
        if (choice := self.tool_choice) is not None:
            if (choice.type == "tool") != (choice.name is not None):
                raise InputError('tool_choice: a name belongs to the type "tool", and to no other')
            named = {"type": "function", "function": {"name": choice.name}}
            asked["tool_choice"] = named if choice.type == "tool" else {"any": "required"}.get(choice.type, choice.type)
            if choice.disable_parallel_tool_use:
                asked["parallel_tool_calls"] = False
        return ChatRequest.model_validate(asked)

    def whole(self, job: Job, made: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
        """Anthropic's object of an answer. made: OpenAI's."""
        message = made["choices"][0]["message"]
        content: list[dict[str, Any]] = []
        if message["content"]:
            content.append({"type": "text", "text": message["content"]})
        content += [_used(call) | {"input": _object(call)} for call in message.get("tool_calls", ())]
        return {**self._message(job, content), **self._end(job, made["choices"][0]["finish_reason"], tokenizer),
                "usage": _usage(job)}  # fmt: skip

    async def events(
        self, job: Job, pieces: AsyncIterator[dict[str, Any]], tokenizer: Tokenizer
    ) -> AsyncIterator[dict[str, Any]]:
        """Anthropic's events of a stream. pieces: OpenAI's."""
        started = {**self._message(job, []), "stop_reason": None, "stop_sequence": None, "usage": _usage(job)}
        yield {"type": "message_start", "message": started}
        number, in_text, reason = 0, False, "stop"

        def stopped() -> dict[str, Any]:
            return {"type": "content_block_stop", "index": number}

        async for piece in pieces:
            (choice,) = piece["choices"]
            if choice["delta"].get("content"):
                if not in_text:
                    in_text = True
                    yield _begun(number, {"type": "text", "text": ""})
                yield _delta(number, {"type": "text_delta", "text": choice["delta"]["content"]})
            for call in choice["delta"].get("tool_calls", ()):
                if in_text:
                    yield stopped()
                    number, in_text = number + 1, False
                yield _begun(number, {**_used(call), "input": {}})
                yield _delta(number, {"type": "input_json_delta", "partial_json": call["function"]["arguments"]})
                yield stopped()
                number += 1
            reason = choice["finish_reason"] or reason
        if in_text:
            yield stopped()
        yield {"type": "message_delta", "delta": self._end(job, reason, tokenizer), "usage": _usage(job)}
        yield {"type": "message_stop"}

    def _message(self, job: Job, content: list[dict[str, Any]]) -> dict[str, Any]:
        made = f"msg_{job.id.rpartition('-')[2]}"
        return {"id": made, "type": "message", "role": "assistant", "model": self.model, "content": content}

    def _end(self, job: Job, reason: str, tokenizer: Tokenizer) -> dict[str, Any]:
        """Why an answer ended. Of stop sequences, the one whose text comes next in what was drawn."""
        kinds = {"length": "max_tokens", "tool_calls": "tool_use"}
        if reason != "stop" or not self.stop_sequences:
            return {"stop_reason": kinds.get(reason, "end_turn"), "stop_sequence": None}
        completion = job.answers[0].completion
        drawn = tokenizer.decode(completion.token_ids, after=job.prompts[0])
        cut = drawn[len(completion.text) :] if drawn.startswith(completion.text) else ""
        found = next((text for text in self.stop_sequences if cut.startswith(text)), None)
        return {"stop_reason": "end_turn" if found is None else "stop_sequence", "stop_sequence": found}


def _turns(message: Message, number: int) -> Iterator[dict[str, Any]]:
    """OpenAI's messages of one of Anthropic's: results of tools are messages of their own, in front."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for block in message.content:
        if isinstance(block, TextBlock):
            parts.append({"type": "text", "text": block.text})
        elif isinstance(block, ImageBlock) and message.role == "user":
            parts.append({"type": "image_url", "image_url": {"url": _address(block.source, number)}})
        elif isinstance(block, ToolResult) and message.role == "user" and not parts:
            yield {"role": "tool", "content": _text(block.content), "tool_call_id": block.tool_use_id}
        elif isinstance(block, ToolUse) and message.role == "assistant":
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
        else:
            raise InputError(
                f"messages[{number}]: a {block.type} has no place there in a message of the {message.role}"
            )
    if calls:
        yield {"role": "assistant", "content": parts or None, "tool_calls": calls}
    elif parts or not message.content:
        yield {"role": message.role, "content": parts}


def _address(source: ImageSource, number: int) -> str:
    if source.type == "url" and source.url is not None:
        return source.url
    if source.type == "base64" and source.data is not None and source.media_type is not None:
        return f"data:{source.media_type};base64,{source.data}"
    raise InputError(f"messages[{number}]: an image's source needs url, or media_type and data")


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _used(call: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call["id"], "name": call["function"]["name"]}


def _object(call: dict[str, Any]) -> Any:
    return json.loads(call["function"]["arguments"])


def _begun(number: int, block: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_start", "index": number, "content_block": block}


def _delta(number: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": number, "delta": delta}


def _usage(job: Job) -> dict[str, Any]:
    """Tokens that shared pages had are counted apart in this form."""
    used = usage_so_far(job)
    cached = used["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": used["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": used["completion_tokens"],
    }
