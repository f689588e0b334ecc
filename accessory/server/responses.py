"""/v1/responses: OpenAI's newer form of a dialogue, translated into a request to /v1/chat/completions and back.

Nothing is stored, so there is no `previous_response_id`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from accessory.data.tokenizer import Tokenizer
from accessory.server.jobs import Job, usage_so_far
from accessory.server.protocol import FUNCTION_NAME, Body, ChatRequest


class InputText(Body):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None  # this and the next come back from earlier answers, and have no effect
    logprobs: list[Any] | None = None


class InputImage(Body):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high"] = "auto"  # has no effect


InputPart = Annotated[InputText | InputImage, Field(discriminator="type")]


class InputItem(Body):
    """What every item may have, and nobody reads."""

    id: str | None = None
    status: str | None = None


class InputMessage(InputItem):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str | Annotated[list[Annotated[InputText | InputImage, Field(discriminator="type")]], Field(fail_fast=True)]
    )


class FunctionCallItem(InputItem):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionOutput(InputItem):
    type: Literal["function_call_output"]
    call_id: str
    output: str


def _kind(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if isinstance(kind, str) else "message"


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutput, Tag("function_call_output")],
    Discriminator(_kind),
]


class OfferedFunction(Body):
    type: Literal["function"]
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenTool(Body):
    type: Literal["function"]
    name: str


class Format(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Body):
    format: Format | None = None


class ResponsesStreamOptions(Body):
    include_obfuscation: bool = False  # has no effect


class ResponsesRequest(Body):
    """NAMES: of fields that /v1/chat/completions calls otherwise."""

    NAMES: ClassVar[dict[str, str]] = {
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "response_format": "text",
    }
    model: str
    input: str | Annotated[list[Item], Field(fail_fast=True, min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: ResponsesStreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    text: TextOptions | None = None
    tools: Annotated[list[OfferedFunction], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    user: str | None = None  # this and the next ones have no effect
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    service_tier: str | None = None

    def chat(self) -> ChatRequest:
        """The same as a request to /v1/chat/completions."""
        given: list[dict[str, Any]] = []
        if self.instructions:
            given.append({"role": "system", "content": self.instructions})
        for item in [self.input] if isinstance(self.input, str) else self.input:
            if isinstance(item, str):
                given.append({"role": "user", "content": item})
            elif isinstance(item, InputMessage):
                given.append({"role": item.role, "content": _content(item)})
            elif isinstance(item, FunctionOutput):
                given.append({"role": "tool", "content": item.output, "tool_call_id": item.call_id})
            else:
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                if given and given[-1]["role"] == "assistant":  # calls of one turn are items of their own
                    given[-1].setdefault("tool_calls", []).append(call)
                else:
                    given.append({"role": "assistant", "content": None, "tool_calls": [call]})
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": given,
            "max_completion_tokens": self.max_output_tokens,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "parallel_tool_calls": self.parallel_tool_calls,
        }
        if self.tools:
            asked["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
                for tool in self.tools
            ]
        if isinstance(self.tool_choice, ChosenTool):
            asked["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        else:
            asked["tool_choice"] = self.tool_choice
        if self.text is not None and (form := self.text.format) is not None:
            asked["response_format"] = {"type": form.type}
            if form.type == "json_schema":
                asked["response_format"]["json_schema"] = {"name": form.name or "answer", "schema": form.json_schema}
        return ChatRequest.model_validate(asked)

    def whole(self, job: Job, made: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
        """The response. made: the object of /v1/chat/completions."""
        (choice,) = made["choices"]
        message, cut = choice["message"], choice["finish_reason"] == "length"
        output = [_message(job, message["content"], cut)] if message["content"] else []
        output += [_call(job, n, call) for n, call in enumerate(message.get("tool_calls", ()))]
        return self._response(job, output, "incomplete" if cut else "completed")

    async def events(
        self, job: Job, pieces: AsyncIterator[dict[str, Any]], tokenizer: Tokenizer
    ) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream. pieces: those of /v1/chat/completions."""
        count, text, cut, output = -1, "", False, list[dict[str, Any]]()

        def event(kind: str, **fields: Any) -> dict[str, Any]:
            nonlocal count
            count += 1
            return {"type": f"response.{kind}", "sequence_number": count, **fields}

        def message_ended() -> list[dict[str, Any]]:
            output.append(_message(job, text, cut))
            (part,) = output[-1]["content"]
            return [
                event("output_text.done", **at, text=text, logprobs=[]),
                event("content_part.done", **at, part=part),
                event("output_item.done", output_index=0, item=output[-1]),
            ]

        at = {"item_id": _message(job, "", False)["id"], "output_index": 0, "content_index": 0}
        for kind in ("created", "in_progress"):
            yield event(kind, response=self._response(job, [], "in_progress"))
        async for piece in pieces:
            (choice,) = piece["choices"]
            if delta := choice["delta"].get("content"):
                if not text:
                    begun = _message(job, "", False) | {"status": "in_progress", "content": []}
                    yield event("output_item.added", output_index=0, item=begun)
                    yield event("content_part.added", **at, part=_part(""))
                text += delta
                yield event("output_text.delta", **at, delta=delta, logprobs=[])
            for n, call in enumerate(choice["delta"].get("tool_calls", ())):
                if text and not output:
                    for ended in message_ended():
                        yield ended
                item, where = _call(job, n, call), {"output_index": len(output)}
                yield event("output_item.added", **where, item=item | {"status": "in_progress", "arguments": ""})
                of = {**where, "item_id": item["id"]}
                yield event("function_call_arguments.delta", **of, delta=item["arguments"])
                yield event("function_call_arguments.done", **of, name=item["name"], arguments=item["arguments"])
                yield event("output_item.done", **where, item=item)
                output.append(item)
            cut = cut or choice["finish_reason"] == "length"
        if text and not output:
            for ended in message_ended():
                yield ended
        status = "incomplete" if cut else "completed"
        yield event(status, response=self._response(job, output, status))

    def _response(self, job: Job, output: list[dict[str, Any]], status: str) -> dict[str, Any]:
        asked = self.model_dump(by_alias=True, exclude_none=True)
        return {
            "id": f"resp_{_number(job)}",
            "object": "response",
            "created_at": job.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.temperature,
            "text": asked.get("text", {"format": {"type": "text"}}),
            "tool_choice": asked.get("tool_choice", "auto"),
            "tools": asked.get("tools", []),
            "top_p": self.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else _usage(job),
        }


def _content(message: InputMessage) -> str | list[dict[str, Any]]:
    if isinstance(message.content, str):
        return message.content
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, InputText)
        else {"type": "image_url", "image_url": {"url": part.image_url}}
        for part in message.content
    ]


def _number(job: Job) -> str:
    return job.id.rpartition("-")[2]


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(job: Job, text: str, cut: bool) -> dict[str, Any]:
    status = "incomplete" if cut else "completed"
    made = {"id": f"msg_{_number(job)}", "type": "message", "role": "assistant", "status": status}
    return {**made, "content": [_part(text)]}


def _call(job: Job, number: int, call: dict[str, Any]) -> dict[str, Any]:
    """number: of the call, in the answer."""
    made = {"id": f"fc_{_number(job)}{number}", "type": "function_call", "status": "completed", "call_id": call["id"]}
    return {**made, **call["function"]}


def _usage(job: Job) -> dict[str, Any]:
    used = usage_so_far(job)
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": {**used["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used["total_tokens"],
    }
