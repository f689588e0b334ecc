"""What the endpoints of text do: a request's body to requests of the engine, and answers to OpenAI's objects.

`Service` knows nothing of HTTP but `ApiError`.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accessory.data.image_tokens import without_tag
from accessory.data.template_base import Template
from accessory.engine.sampling_params import SamplingParams
from accessory.errors import InputError
from accessory.model.text_model import TextModel
from accessory.model.writing import Completion, TextRequest
from accessory.server.answers import EngineThread, merged
from accessory.server.failures import ApiError
from accessory.server.grammars import Grammars, Mask
from accessory.server.images import read_image
from accessory.server.jobs import Job, usage, usage_so_far
from accessory.server.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Generation,
    ImagePart,
    TokenizeRequest,
)
from accessory.server.tokens import chat_logprobs, completion_logprobs
from accessory.server.tools import Tools


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. hosts: those from which images are fetched; data URLs need none."""

    image_bytes: int = 20 * 2**20
    hosts: frozenset[str] = frozenset()


class Service:
    """One model with its adapters, by the names under which clients ask for them."""

    def __init__(
        self,
        model: TextModel,
        thread: EngineThread,
        *,
        name: str,
        template: Template,
        limits: Limits,
    ) -> None:
        self.model, self.thread, self.name, self.template, self.limits = model, thread, name, template, limits
        self.grammars = Grammars(model.tokenizer, model.args.vocab_size)
        self.began = int(time.time())

    def models(self) -> list[dict[str, Any]]:
        """The entries of /v1/models."""
        about = {"object": "model", "created": self.began, "owned_by": "accessory"}
        longest = {"max_model_len": self.model.max_seq_len}
        own = {"id": self.name, **about, **longest, "root": self.name, "parent": None}
        return [own, *({"id": n, **about, **longest, "root": n, "parent": self.name} for n in self.model.adapters)]

    def adapter(self, name: str) -> str | None:
        """The adapter that a request asks for; None for the model itself."""
        if name == self.name:
            return None
        if name not in self.model.adapters:
            known = ", ".join((self.name, *self.model.adapters))
            raise ApiError(
                f"model: got {name!r:.100}, but this server has {known}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name

    # ----------------------------------------------------------------- completions

    async def begin_completion(self, body: CompletionRequest) -> Job:
        """Raises ApiError and AccessoryError for what cannot be answered."""
        if body.suffix is not None:
            raise InputError("suffix: this model cannot fill text in; leave it out")
        if body.best_of not in (None, body.n):
            raise InputError(f"best_of: got {body.best_of}, but it must be n, {body.n}: every answer is returned")
        if body.stream and body.echo:
            raise InputError("echo: a prompt is not streamed; leave stream out")
        return await self._in_thread(self._completion, body, asyncio.get_running_loop())

    def _completion(self, body: CompletionRequest, loop: asyncio.AbstractEventLoop) -> Job:
        adapter = self.adapter(body.model)
        prompts = [self._ids(prompt) for prompt in body.prompts()]
        judged = body.logprobs if body.echo else None
        params = body.sampling(logprobs=body.logprobs, prompt_logprobs=judged)
        longest = body.max_tokens
        if longest == 0 and not body.echo:
            raise InputError("max_tokens: got 0; give at least 1, or echo")
        constraint = self.grammars.of(body.structured_outputs, ignore_eos=body.ignore_eos, min_tokens=body.min_tokens)
        requests = [
            self._request(ids, body, params, self._room(ids, longest), adapter, f"prompt[{number}]")
            for number, ids in enumerate(prompts)
        ]
        return self._submit("cmpl", body, prompts, requests, constraint, loop)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        tokenizer = self.model.tokenizer
        if not prompt:
            raise InputError("prompt: is empty; give at least one character or token")
        if isinstance(prompt, list):
            if max(prompt) >= self.model.args.vocab_size:
                raise InputError(
                    f"prompt: got the token {max(prompt)}, but the last one is {self.model.args.vocab_size - 1}"
                )
            return prompt
        self._check_length([prompt], "prompt")
        return tokenizer.encode(prompt, bos=tokenizer.add_bos, special=True)

    def completion(self, job: Job, completions: Sequence[Completion]) -> dict[str, Any]:
        """OpenAI's object of all answers, when they have ended."""
        body = job.body
        assert isinstance(body, CompletionRequest)
        choices = []
        for number, answer in enumerate(completions):
            ids = job.prompts[number // body.n]
            echoed = self._echo(body.prompts()[number // body.n]) if body.echo else ""
            if body.max_tokens == 0:
                answer = replace(answer, text="", token_ids=[], logprobs=[], top_logprobs=[], finish_reason="length")
            logprobs = None
            if body.logprobs is not None:
                logprobs = completion_logprobs(self.model.tokenizer, ids if body.echo else [], answer, ids)
            choices.append(
                {
                    "index": number,
                    "text": echoed + answer.text,
                    "logprobs": logprobs,
                    "finish_reason": answer.finish_reason,
                }
            )
        return self._object("text_completion", job, choices, usage(job, completions))

    def _echo(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.model.tokenizer.decode(prompt)

    async def completion_pieces(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        """OpenAI's objects while the answers are written."""
        body, tokenizer = job.body, self.model.tokenizer
        assert isinstance(body, CompletionRequest)
        async for number, answer, piece in merged(job.answers):
            logprobs = None
            if body.logprobs is not None:
                ids = job.prompts[number // body.n]
                logprobs = completion_logprobs(tokenizer, [], answer.completion, ids, piece.tokens)
            if not piece.text and piece.finish_reason is None and logprobs is None:
                continue
            choice = {
                "index": number,
                "text": piece.text,
                "logprobs": logprobs,
                "finish_reason": piece.finish_reason,
            }
            yield self._piece("text_completion", job, [choice])
        if body.stream_options is not None and body.stream_options.include_usage:
            yield self._object("text_completion", job, [], usage_so_far(job))

    # ----------------------------------------------------------------- dialogues

    async def begin_chat(self, body: ChatRequest) -> Job:
        """Raises ApiError and AccessoryError for what cannot be answered."""
        if body.top_logprobs is not None and not body.logprobs:
            raise InputError("top_logprobs: they come with log-probabilities; give logprobs true too")
        return await self._in_thread(self._chat, body, asyncio.get_running_loop())

    def _chat(self, body: ChatRequest, loop: asyncio.AbstractEventLoop) -> Job:
        adapter = self.adapter(body.model)
        tools = Tools.of(body, self.model.tokenizer)
        ids, image = self.prompt_of(body.messages, tools)
        params = body.sampling(logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        longest = body.max_completion_tokens or body.max_tokens
        places = self.model.image_words if image is not None else 0
        calls = None if tools is None else tools.grammar
        constraint = self.grammars.of(
            body.structured_outputs, body.response_format, calls, ignore_eos=body.ignore_eos, min_tokens=body.min_tokens
        )
        request = self._request(ids, body, params, self._room(ids, longest, places), adapter, "messages")
        request = replace(request, image=image, stops=[*self.template.stop_strings, *request.stops])
        return self._submit("chatcmpl", body, [ids], [request], constraint, loop)

    def prompt_of(self, messages: Sequence[ChatMessage], tools: Tools | None = None) -> tuple[list[int], Any]:
        """The ids of a dialogue, and its image. One dialogue has one image at most, before its first question."""
        images = [
            part.image_url.url
            for message in messages
            if isinstance(message.content, list)
            for part in message.content
            if isinstance(part, ImagePart)
        ]
        if images and self.model.image_processor is None:
            raise InputError("messages: this model takes no images")
        if len(images) > 1:
            raise InputError(f"messages: got {len(images)} images, but a dialogue may have one")
        try:
            image = read_image(images[0], self.limits.image_bytes, self.limits.hosts) if images else None
            if tools is not None:
                self._check_length([part.model_dump_json() for part in (*messages, *tools.offered)], "messages")
                return tools.prompt_ids(messages), image
            turns = [
                {"role": "system" if m.role == "developer" else m.role, "content": text_of(m, bool(images))}
                for m in messages
            ]
            self._check_length([turn["content"] for turn in turns], "messages")
            return self.template.prompt_ids(turns, self.model.tokenizer), image
        except InputError as error:  # it speaks of an image or of the template, which are no fields
            if str(error).startswith("messages"):
                raise
            raise InputError(f"messages: {error}") from error

    def chat(self, job: Job, completions: Sequence[Completion]) -> dict[str, Any]:
        """OpenAI's object of all answers, when they have ended."""
        body = job.body
        assert isinstance(body, ChatRequest)
        tools = Tools.of(body, self.model.tokenizer)
        choices = []
        for number, answer in enumerate(completions):
            calls = [] if tools is None else tools.calls(answer)
            said = answer.text if tools is None or not calls else tools.said(answer)
            message: dict[str, Any] = {"role": "assistant", "content": self.template.reply(said), "refusal": None}
            if calls:
                message |= {"content": message["content"] or None, "tool_calls": calls}
            logprobs = chat_logprobs(self.model.tokenizer, answer) if body.logprobs else None
            ended = {"logprobs": logprobs, "finish_reason": "tool_calls" if calls else answer.finish_reason}
            choices.append({"index": number, "message": message, **ended})
        return self._object("chat.completion", job, choices, usage(job, completions))

    async def chat_pieces(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        """OpenAI's objects while the answers are written. The calls of tools are one piece."""
        body = job.body
        assert isinstance(body, ChatRequest)
        tools = Tools.of(body, self.model.tokenizer)
        shown = [""] * len(job.answers)

        def piece_of(number: int, delta: dict[str, Any], logprobs: Any = None, reason: Any = None) -> dict[str, Any]:
            choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return self._piece("chat.completion.chunk", job, [choice])

        for number in range(len(job.answers)):
            yield piece_of(number, {"role": "assistant", "content": "", "refusal": None})
        async for number, answer, piece in merged(job.answers):
            completion, reason = answer.completion, piece.finish_reason
            logprobs = chat_logprobs(self.model.tokenizer, completion, piece.tokens) if body.logprobs else None
            if tools is not None and tools.calling(completion):
                if reason is None:
                    continue
                if calls := tools.calls(completion):
                    called = [{"index": n, **call} for n, call in enumerate(calls)]
                    yield piece_of(number, {"tool_calls": called}, logprobs)
                    yield piece_of(number, {}, None, "tool_calls")
                    continue
            whole = completion.text
            # What may become the template's own space is not shown before it is known.
            pending = reason is None and self.template.reply_space.startswith(whole)
            whole = "" if pending else self.template.reply(whole)
            delta, shown[number] = whole[len(shown[number]) :], whole
            if delta or logprobs is not None:
                yield piece_of(number, {"content": delta}, logprobs)
            if reason is not None:
                yield piece_of(number, {}, None, reason)
        if body.stream_options is not None and body.stream_options.include_usage:
            yield self._object("chat.completion.chunk", job, [], usage_so_far(job))

    def tokenize(self, body: TokenizeRequest) -> list[int]:
        """The ids of a text, or of a dialogue up to where its answer begins."""
        if (body.prompt is None) == (body.messages is None):
            raise InputError("prompt: give either a prompt or messages")
        if body.messages is not None:
            return self.prompt_of(body.messages)[0]
        assert body.prompt is not None
        self._check_length([body.prompt], "prompt")
        tokenizer = self.model.tokenizer
        return tokenizer.encode(body.prompt, bos=tokenizer.add_bos and body.add_special_tokens, special=True)

    # ----------------------------------------------------------------- what both share

    @functools.cached_property
    def _longest_token(self) -> int:
        tokenizer = self.model.tokenizer
        return max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))

    def _check_length(self, texts: Sequence[str], param: str) -> None:
        """ApiError for what is too long however it is encoded: encoding megabytes takes seconds, and memory."""
        most, size = self.model.max_seq_len, sum(map(len, texts))
        if size > most * self._longest_token:
            raise ApiError(
                f"This model's maximum context length is {most} tokens. However, the prompt has {size} characters, "
                f"which are {size // self._longest_token} tokens at least; shorten it",
                param=param,
                code="context_length_exceeded",
            )

    def _room(self, ids: Sequence[int], longest: int | None, places: int = 0) -> int:
        """How many tokens an answer may have. ApiError where prompt and answer are longer than the context."""
        most = self.model.max_seq_len
        room = most - len(ids) - places
        asked = 1 if longest == 0 else longest
        if room < (asked or 1):
            wanted = "an answer" if not longest else f"{longest} of the answer"
            raise ApiError(
                f"This model's maximum context length is {most} tokens. However, the prompt has {len(ids) + places} "
                f"tokens, which leaves no room for {wanted}; shorten the prompt, or max_tokens",
                param="messages" if longest is None else "max_tokens",
                code="context_length_exceeded",
            )
        return asked or room

    def _request(
        self,
        ids: list[int],
        body: Generation,
        params: SamplingParams,
        longest: int,
        adapter: str | None,
        name: str,
    ) -> TextRequest:
        return TextRequest(
            ids,
            None,
            longest,
            params,
            body.stops(),
            name,
            adapter=adapter,
            stop_token_ids=tuple(body.stop_token_ids or ()),
        )

    def _submit(
        self,
        prefix: str,
        body: Generation,
        prompts: list[list[int]],
        requests: Sequence[TextRequest],
        constraint: Callable[[], Mask] | None,
        loop: asyncio.AbstractEventLoop,
    ) -> Job:
        most = self.thread.engine.scheduler.max_waiting
        if len(requests) * body.n > most:  # this never becomes possible, so it is not BusyError's
            what = f"{len(requests)} prompts with {body.n} answers each"
            raise InputError(f"n: got {what}, but a request may have {most} answers")
        copies = []
        for request in requests:
            params = request.params
            if body.n > 1:  # the copies of one request share a seed and differ by their numbers
                params = params.with_seed(secrets.randbelow(2**62))
            for number in range(body.n):
                mask = None if constraint is None else constraint()
                copies.append(replace(request, params=replace(params, copy=number), mask=mask))
        answers = self.thread.submit(copies, loop)
        return Job(f"{prefix}-{secrets.token_hex(16)}", body, answers, prompts)

    def leave(self, job: Job) -> None:
        """Nobody reads these answers any more."""
        self.thread.leave(job.answers)

    def _object(
        self, kind: str, job: Job, choices: list[dict[str, Any]], used: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        made = {"id": job.id, "object": kind, "created": job.created, "model": job.body.model, "choices": choices}
        return made if used is None else {**made, "usage": used}

    def _piece(self, kind: str, job: Job, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """An object of a stream that ends with the usage, if that is asked for: null in those before."""
        options = job.body.stream_options
        if options is None or not options.include_usage:
            return self._object(kind, job, choices)
        used = usage_so_far(job) if options.continuous_usage_stats else None
        return {**self._object(kind, job, choices), "usage": used}

    async def _in_thread(self, work: Callable[..., Job], *arguments: Any) -> Job:
        """Encoding text and opening images takes time, in which the event loop serves others."""
        body = arguments[0]
        if body.stream_options is not None and not body.stream:
            raise InputError("stream_options: they are of a stream; give stream true too")
        return await asyncio.get_running_loop().run_in_executor(None, functools.partial(work, *arguments))


def text_of(message: ChatMessage, with_image: bool) -> str:
    """A message's text. In a dialogue about an image, its tag is taken out, as the pages do."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content if not isinstance(part, ImagePart))
    if content is None:
        raise InputError(f"messages: a message of the {message.role} has no content")
    return without_tag(content) if with_image and message.role == "user" else content
