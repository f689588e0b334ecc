"""The requests of OpenAI's API as pydantic models, with the fields that vLLM adds. Unknown fields are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from accessory.engine.sampling_params import SamplingParams
from accessory.errors import InputError

MOST_COPIES = 128  # `n`, as in OpenAI's API
MOST_STOPS = 4
MOST_PROMPTS = 2048  # of one request to /v1/completions
FUNCTION_NAME = r"^[a-zA-Z0-9_-]{1,64}$"
DEFAULT_MAX_TOKENS = 16  # of a completion; a chat's answer may fill the context

MOST_BIASES = 65536  # at least as many as any tokenizer has tokens that somebody would bias

# A list is read up to its first wrong item: a body of millions of them must not become millions of errors.
Texts = Annotated[list[str], Field(fail_fast=True)]
Stop = Annotated[Texts, Field(max_length=MOST_STOPS)] | str | None
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]


def _few(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > MOST_BIASES:
        raise ValueError(f"there may be {MOST_BIASES} tokens at most")
    return given


class Body(BaseModel):
    """Strict: a number in quotation marks is no number, and NaN is none either."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        """Null stands for a field that is left out, as in OpenAI's API. Of unknown fields, the first is enough."""
        if not isinstance(given, dict):
            return given
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        unknown = next((name for name in given if name not in fields), None)
        return {
            name: value
            for name, value in given.items()
            if name == unknown or (name in fields and (value is not None or fields[name].is_required()))
        }


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: each piece has the usage so far
    include_obfuscation: bool = False  # has no effect: an answer's pieces are not padded


class Generation(Body):
    """What requests of both endpoints have in common."""

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_COPIES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_few)] = None
    user: str | None = None  # this and the next two say who asks, and have no effect
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    # vLLM's
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    stop_token_ids: Ids | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    structured_outputs: StructuredOutputs | None = None

    def stops(self) -> list[str]:
        """The texts that end an answer."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in found:
            raise InputError("stop: got an empty text, which would end every answer at once")
        return found

    def sampling(self, **asked: Any) -> SamplingParams:
        """How tokens are drawn. asked: log-probabilities."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_bias(self.logit_bias),
            seed=self.seed,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            **asked,
        )


class StructuredOutputs(Body):
    """vLLM's field for what an answer must match: one of these."""

    json_schema: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: str | None = None
    grammar: str | None = None  # Lark's form
    choice: Texts | None = None


class CompletionRequest(Generation):
    prompt: (
        str
        | Ids
        | Annotated[Texts, Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = DEFAULT_MAX_TOKENS
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """One string or list of token ids for each prompt."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Body):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # has no effect: a model has one size of images


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None  # has no effect: templates have no place for it
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]


class Function(Body):
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    name: str


class ToolChoice(Body):
    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Body):
    name: str
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Generation):
    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None  # has no effect: nothing is stored
    service_tier: str | None = None


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Ids


def _bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    for token in given:
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise InputError(f"logit_bias: got the token {token!r:.40}, but it must be a token's id")
    return {int(token): bias for token, bias in given.items()}


Generation.model_rebuild()
# What a message may name as the field that is wrong.
FIELDS = frozenset(
    name for body in (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest) for name in body.model_fields
)
