"""What is told of requests when they have ended: the access log, ids, and spans. None of it has contents."""

from __future__ import annotations

import logging
import re

import pytest
from helpers.serving import NAME, eventually, serving

from accessory.server.visits import AccessLog, spans

SECRET = "the secret word"
ASK = {"prompt": SECRET, "max_tokens": 4, "temperature": 0}


@pytest.fixture
def lines(caplog):
    """The access log's lines."""
    log = AccessLog()
    logger = logging.getLogger("accessory.access")
    logger.addHandler(caplog.handler)
    yield log, lambda: [record.getMessage() for record in caplog.records if record.name == "accessory.access"]
    logger.handlers = []


def test_a_line_a_request_without_contents(model, lines):
    log, said = lines
    with serving(model, api_key="a-key", watchers=[log]) as server:
        count = len(server.raw.post("/tokenize", json={"prompt": SECRET}).json()["tokens"])
        server.post("/v1/completions", **ASK)
        server.post("/v1/chat/completions", messages=[{"role": "user", "content": SECRET}], max_tokens=3, stream=True)
        server.post("/v1/completions", prompt="")
        server.raw.get("/v1/models?secret=word")
        server.raw.get("/nothing/%0A\u00e4", headers={"Authorization": "Bearer other"})
        eventually(lambda: len(said()) == 6)
    found = [
        re.fullmatch(r"(\w+ \S+ \d+) \d+ ms, (\d+) tokens in, (\d+) out, req-[0-9a-f]{32}", line) for line in said()
    ]
    assert all(found), said()
    assert [match[1] for match in found] == [
        "POST /tokenize 200", "POST /v1/completions 200", "POST /v1/chat/completions 200", "POST /v1/completions 400",
        "GET /v1/models 200", "GET /nothing/%0A%C3%A4 401",
    ]  # fmt: skip
    assert (found[1][2], found[1][3]) == (str(count), "4")
    assert int(found[2][2]) > count
    assert found[2][3] == "3"
    assert (found[3][2], found[3][3]) == ("0", "0")
    assert not any(word in line for line in said() for word in ("secret", "word", "a-key"))


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-123", True), ("a" * 128, True), ("a" * 129, False), ("two words", False), ("\u00e4", False), ("", False)],
)
def test_an_id_comes_back(server, given, kept):
    answer = server.raw.get("/health", headers={"X-Request-Id": given.encode()})
    (found,) = answer.headers.get_list("x-request-id")
    assert found == given if kept else re.fullmatch("req-[0-9a-f]{32}", found)


def test_every_answer_has_an_id(server):
    stream = server.post("/v1/completions", **ASK, stream=True)
    answers = (stream, server.post("/v1/completions", prompt=""), server.raw.get("/nothing"))
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 3
    assert server.openai.completions.create(model=NAME, **ASK)._request_id  # where the client looks for it


def test_a_span_a_request(model, monkeypatch):
    pytest.importorskip("opentelemetry.sdk", reason="needs opentelemetry-sdk: make test-serve installs it")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(model, watchers=[spans()]) as server:
        body = {"model": NAME, **ASK, "stream": True}
        server.raw.post("/v1/completions", json=body, headers={"traceparent": parent})
        server.post("/v1/completions", prompt="")
        eventually(lambda: len(exporter.get_finished_spans()) == 2)
    first, second = exporter.get_finished_spans()
    assert first.name == f"text_completion {NAME}"
    told = dict(first.attributes)
    assert (told["gen_ai.request.model"], told["gen_ai.usage.output_tokens"]) == (NAME, 4)
    assert told["gen_ai.usage.input_tokens"] == len(model.tokenizer.encode(SECRET, bos=True))
    assert 0 < told["gen_ai.server.time_to_first_token"] <= (first.end_time - first.start_time) / 1e9
    assert f"{first.parent.trace_id:032x}" == parent.split("-")[1]
    assert (second.name, second.attributes["http.response.status_code"]) == ("POST /v1/completions", 400)
    assert "secret" not in str(told)


def test_without_opentelemetry_there_are_no_spans(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry", None)
    assert spans() is None
