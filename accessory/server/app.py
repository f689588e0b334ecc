"""The HTTP application: its routes, behind the `Gate`. `Service` does what they ask for."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException

import accessory
from accessory.errors import InputError
from accessory.model.writing import Completion
from accessory.server.answers import Answer
from accessory.server.failures import ApiError, api_error
from accessory.server.gate import Gate
from accessory.server.messages import MessagesRequest
from accessory.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from accessory.server.responses import ResponsesRequest
from accessory.server.service import Job, Service
from accessory.server.visits import Watcher

log = logging.getLogger(__name__)

Written = Callable[[dict[str, Any]], str]

_NO_FIELDS = ("body", "query", "path")


def make_app(
    service: Service,
    *,
    api_key: str | None = None,
    most_bytes: int,
    page: Any = None,
    watchers: Sequence[Watcher] = (),
) -> Any:
    """The application. most_bytes: of a request's body. With a key, every route but /health wants it.

    page: an ASGI application for all addresses that the API does not have. watchers: called when a request has ended.
    """
    app = FastAPI(title="accessory", version=accessory.__version__, docs_url="/docs", redoc_url=None)
    thread = service.thread

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _failed(_explained(error.errors()), service)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        headers = None if error.headers is None else dict(error.headers)  # 405 says which methods there are
        return _failed(ApiError(str(error.detail), status=error.status_code, headers=headers), service)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return _failed(error, service)

    @app.get("/health")
    async def health() -> Response:
        """Whether requests are answered."""
        if thread.failure is not None:
            return JSONResponse({"status": "failed", "reason": thread.failure}, status_code=503)
        return JSONResponse({"status": "ok"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": accessory.__version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(thread.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        found = next((entry for entry in service.models() if entry["id"] == name), None)
        if found is None:
            service.adapter(name)  # raises
        return JSONResponse(found)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(
            service, request, body.stream, service.begin_completion(body), service.completion, service.completion_pieces
        )

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _answer(service, request, body.stream, service.begin_chat(body), service.chat, service.chat_pieces)

    async def translated(body: MessagesRequest | ResponsesRequest, request: Request) -> Response:
        """Answer another form of a dialogue as /v1/chat/completions would."""
        tokenizer = service.model.tokenizer

        async def begin() -> Job:
            try:
                return await service.begin_chat(body.chat())
            except ValidationError as error:
                raise _explained(error.errors()) from error
            except InputError as error:
                named = re.sub(r"^[a-z_]+", lambda field: body.NAMES.get(field[0], field[0]), str(error))
                raise InputError(named) from error
            except ApiError as error:
                error.param = body.NAMES.get(error.param or "", error.param)
                raise

        return await _answer(
            service,
            request,
            body.stream,
            begin(),
            lambda job, completions: body.whole(job, service.chat(job, completions), tokenizer),
            lambda job: body.events(job, service.chat_pieces(job), tokenizer),
            _as_event,
        )

    @app.post("/v1/messages")
    async def messages(body: MessagesRequest, request: Request) -> Response:
        return await translated(body, request)

    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        return await translated(body, request)

    @app.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        ids = service.tokenize(body)
        return {"count": len(ids), "max_model_len": service.model.max_seq_len, "tokens": ids}

    @app.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        return {"prompt": service.model.tokenizer.decode(body.tokens)}

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return _failed(error, service)

    @app.exception_handler(InputError)
    async def wrong(_: Request, error: InputError) -> Response:
        return _failed(error, service)

    return Gate(app, api_key, most_bytes, thread.metrics, page, watchers)


async def _answer(
    service: Service,
    request: Request,
    stream: bool,
    begin: Coroutine[Any, Any, Job],
    whole: Callable[[Job, Sequence[Any]], dict[str, Any]],
    pieces: Callable[[Job], AsyncIterator[dict[str, Any]]],
    written: Written | None = None,
) -> Response:
    """Begin, and answer at the end or piece by piece. Where the client leaves, what it asked for is given up.

    written: how a stream's pieces and its error are written; None: as OpenAI's API does, with [DONE] at the end.
    """
    try:
        job = request.state.job = await begin
    except Exception as error:
        return _failed(error, service)
    if stream:
        return _Events(service, job, pieces(job), written)
    try:
        completions = await _unless_gone(request, _whole(job.answers))
        if completions is None:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(whole(job, completions))
    except Exception as error:
        return _failed(error, service)
    finally:
        service.leave(job)


class _Events(StreamingResponse):
    """Server-sent events. An error that comes after the first one is an event too."""

    def __init__(
        self, service: Service, job: Job, pieces: AsyncIterator[dict[str, Any]], written: Written | None = None
    ) -> None:
        self._service, self._job = service, job
        self._written, self._ends = written or _as_data, written is None
        super().__init__(self._events(pieces), media_type="text/event-stream")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # the client may leave before the first event, and then nothing of `_events` runs
            self._service.leave(self._job)

    async def _events(self, pieces: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
        try:
            async for piece in pieces:
                yield self._written(piece)
        except Exception as error:
            failed = api_error(error)
            self._service.thread.metrics.errors.labels(failed.status).inc()
            log.warning("a stream ended with an error: %s", error)
            yield self._written(failed.body())
        if self._ends:
            yield "data: [DONE]\n\n"


def _as_data(piece: dict[str, Any]) -> str:
    return f"data: {json.dumps(piece, ensure_ascii=False)}\n\n"


def _as_event(piece: dict[str, Any]) -> str:
    """With its name, which is its type. An error has its fields beside its object too: /v1/responses has them there."""
    if "error" in piece and "type" not in piece:
        piece = {**piece["error"], "type": "error", "error": piece["error"], "sequence_number": -1}
    return f"event: {piece['type']}\n{_as_data(piece)}"


async def _whole(answers: Sequence[Answer]) -> list[Completion]:
    return await asyncio.gather(*(answer.whole() for answer in answers))


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, or None if the client leaves before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    left, working = asyncio.ensure_future(gone()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({working, left}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (left, working):
            task.cancel()


def _failed(error: BaseException, service: Service) -> Response:
    failed = api_error(error)
    service.thread.metrics.errors.labels(failed.status).inc()
    if failed.status >= 500:
        log.error("a request failed: %s", error, exc_info=error if failed.status == 500 else None)
    return JSONResponse(failed.body(), status_code=failed.status, headers=failed.headers)


def _explained(problems: Sequence[Any]) -> ApiError:
    """The first problem that pydantic found, as OpenAI's API words it.

    Where a value is none of several types, each has its problem. The one that lies deepest says most.
    """
    first = problems[0]["loc"][:2]
    problem = max((p for p in problems if p["loc"][:2] == first), key=lambda p: len(p["loc"]))
    fields = [str(part) for part in problem["loc"] if part not in _NO_FIELDS]
    # A union's loc names the type that was tried too, as "str" or "list[int]".
    types = {
        "str", "int", "float", "bool", "text", "image_url", "image", "tool_use", "tool_result", "message",
        "function_call", "function_call_output", "input_text", "output_text", "input_image",
    }  # fmt: skip
    named = [
        part
        for n, part in enumerate(fields)
        if (part.isidentifier() and (n == 0 or part not in types)) or part.isdigit()
    ]
    param = ".".join(named) or None
    if problem["type"] == "json_invalid":
        return ApiError(f"We could not parse the JSON body of your request: {problem['ctx']['error']}")
    if problem["type"] == "extra_forbidden":
        param = ".".join([*named[: None if fields[-1] not in named[-1:] else -1], fields[-1]])
        return ApiError(f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    given = problem.get("input")
    got = "" if problem["type"] == "missing" else f" (got {given!r:.60})"
    return ApiError(f"{param or 'body'}: {problem['msg']}{got}", param=param)
