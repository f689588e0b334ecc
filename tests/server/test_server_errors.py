"""Requests that cannot be answered: each gets one line in OpenAI's form that names the field."""

from __future__ import annotations

import json
import socket
import time

import httpx
import pytest
from helpers.serving import NAME, check_error, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MOST = 3 * 2**20


@pytest.fixture(scope="module")
def server(model):
    with serving(model, most_bytes=MOST) as made:
        yield made


@pytest.fixture(scope="module")
def locked(model):
    with serving(model, api_key="a-secret-word") as made:
        yield made


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[1, 2]", None),
        (b'"text"', None),
        (b"null", None),
        (b"\xff\xfe", None),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"model": "tiny", "prompt": "a", "temperature": Infinity}', "temperature"),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"model": "tiny", "prompt": "a", "n": ' + b"9" * 4000 + b"}", "n"),
        (b'{"model": "tiny", "prompt": "a", "n": ' + b"9" * 5000 + b"}", None),
        (b'{"model": "tiny", "prompt": "a", "logit_bias": {"' + b"1" * 5000 + b'": 1}}', "logit_bias"),
        (b'{"model": "tiny", "prompt": "a", "colo\\ud800ur": 1}', None),
        (b'{"model": "ti\\ud800ny", "prompt": "a"}', "model"),
        (b"[" * 100_000, None),
        (b'{"metadata": {"a": ' + b"[" * 900 + b"]" * 900 + b'}, "model": "tiny", "prompt": ""}', "prompt"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bodies_that_are_none(server, body, param):
    answer = server.raw.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    check_error(answer, 404 if param == "model" else 400, param)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"temperature": "0"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 10**30}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 129}, "n"),
        ({"prompt": ["a"] * 100, "n": 100}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 256}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": 3}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids.0"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"32000": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
        ({"logit_bias": {str(n): 1 for n in range(70_000)}}, "logit_bias"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"min_tokens": 2**40}, "min_tokens"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, -5]}, "prompt.1"),
        ({"prompt": [1, 32000]}, "prompt"),
        ({"prompt": [1, True]}, "prompt.1"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": list(range(300))}, "max_tokens"),
        ({"colour": "red"}, "colour"),
        ({"col-our": "red"}, "col-our"),
        ({"stream_options": {"colour": 1}, "stream": True}, "stream_options.colour"),
        ({"model": "other"}, "model"),
        ({"model": 3}, "model"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_fields_that_are_wrong(server, given, param):
    status = 404 if given.get("model") == "other" else 400
    check_error(server.post(COMPLETIONS, **{"prompt": "a", **given}), status, param)


def test_a_field_that_is_missing(server):
    check_error(server.raw.post(COMPLETIONS, json={"model": NAME}), 400, "prompt", "required")
    check_error(server.raw.post(CHAT, json={"model": NAME}), 400, "messages", "required")


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": [1.5] * 580_000},
        {"prompt": ["a"] * 580_000},
        {"prompt": [[-1]] * 300_000},
        {"prompt": "a", "stop_token_ids": ["a"] * 580_000},
        {"prompt": "a", **{f"field{n}": 1 for n in range(100_000)}},
        {"prompt": "a", "structured_outputs": {"choice": [1] * 900_000}},
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_million_mistakes_take_no_longer_than_one(server, given):
    begun = time.monotonic()
    answer = server.post(COMPLETIONS, **given)
    assert (answer.status_code, len(answer.content) < 1000) == (400, True)
    assert time.monotonic() - begun < 2  # more, and gigabytes, where each item became an error


def test_a_long_prompt_is_refused(server):
    begun = time.monotonic()
    check_error(server.post(COMPLETIONS, prompt="word " * 500_000), 400, "prompt", "maximum context length")
    messages = [{"role": "user", "content": "word " * 500_000}]
    check_error(server.post(CHAT, messages=messages), 400, "messages", "maximum context length")
    check_error(server.raw.post("/tokenize", json={"prompt": "word " * 500_000}), 400, "prompt")
    assert time.monotonic() - begun < 3  # encoding alone would take longer


def test_bodies_over_the_limit(server):
    """Said by Content-Length, or found while they arrive."""
    big = json.dumps({"model": NAME, "prompt": "a" * MOST}).encode()
    check_error(server.raw.post(COMPLETIONS, content=big), 413, None, str(MOST))
    chunks = (big[at : at + 2**16] for at in range(0, len(big), 2**16))
    check_error(server.raw.post(COMPLETIONS, content=chunks), 413, None, str(MOST))
    refused = server.metric("request_errors_total", status="413")
    assert refused >= 2
    assert server.post(COMPLETIONS, prompt="a", max_tokens=1).status_code == 200


def test_ten_megabytes(model):
    with serving(model, most_bytes=32 * 2**20) as large:
        begun = time.monotonic()
        check_error(large.post(COMPLETIONS, prompt="a" * 10 * 2**20), 400, "prompt", "maximum context length")
        assert time.monotonic() - begun < 5
        check_error(large.post(COMPLETIONS, prompt=[5] * 4 * 2**20), 400, "max_tokens", "maximum context length")


def raw_answer(server, content: bytes) -> bytes:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        try:
            connection.sendall(content)
            return connection.recv(2**16)
        except ConnectionError:
            return b""


def test_headers_of_a_megabyte(server):
    answer = raw_answer(server, b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 2**20 + b"\r\n\r\n")
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert raw_answer(server, b"\x16\x03\x01 no HTTP\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert server.raw.get("/health").status_code == 200


HEAD = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 20\r\n"
WHOLE = HEAD + b'\r\n{"prompt": "A nice"}'


@pytest.mark.parametrize(
    "sent",
    [[b""], [b"GET /hea"], [HEAD], [HEAD + b"\r\n"], [HEAD + b"\r\n", b'{"prompt"'], [WHOLE, b"GET /hea"]],
    ids=["nothing", "half a line", "half a head", "no body", "half a body", "half a second one"],
)
def test_a_request_that_does_not_come_is_dropped(server, monkeypatch, sent):
    monkeypatch.setattr("accessory.server.running.PATIENCE", 0.3)
    host, port = server.url.removeprefix("http://").split(":")
    begun = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=4) as connection:
        for content in sent:
            connection.sendall(content)
            if content == WHOLE:
                assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
        while connection.recv(2**16):  # what it says to that
            pass
    assert 0.25 < time.monotonic() - begun < 3


def test_a_head_that_trickles_is_dropped_and_a_body_that_trickles_is_read(server, monkeypatch):
    monkeypatch.setattr("accessory.server.running.PATIENCE", 0.5)
    host, port = server.url.removeprefix("http://").split(":")

    def trickled(before, slowly):
        with socket.create_connection((host, int(port)), timeout=4) as connection:
            connection.sendall(before)
            try:
                for byte in slowly:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)
                return connection.recv(2**16)
            except ConnectionError:
                return b""

    assert trickled(b"", HEAD + b"\r\n") == b""
    head, body = WHOLE.split(b"\r\n\r\n")
    assert trickled(head + b"\r\n\r\n", body).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/v1/completions/", "/../etc/passwd", "/v1/models/../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd",
     "//health", "/v1/models/%00", "/v1/models/%ff%fe", "/health/../metrics"],
)  # fmt: skip
def test_paths_that_lead_nowhere(server, locked, path):
    answer = raw_answer(server, f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] in (b"404", b"405", b"307"), answer
    assert b"root:" not in answer
    closed = raw_answer(locked, f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert closed.split()[1] == b"401"


def test_methods(server):
    answer = server.raw.get(COMPLETIONS)
    check_error(answer, 405)
    assert answer.headers["allow"] == "POST"
    check_error(server.raw.post("/v1/models"), 405)


ROUTES = [
    ("GET", "/version"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/docs"),
    ("GET", "/openapi.json"), ("POST", COMPLETIONS), ("POST", CHAT), ("POST", "/tokenize"), ("POST", "/detokenize"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_but_health_wants_the_key(locked, method, path):
    wrong = ({}, {"Authorization": "Bearer other"}, {"Authorization": "a-secret-word"},
             {"Authorization": "Basic a-secret-word"}, {"Authorization": b"Bearer \xff\xfe"},
             {"Authorization": "Bearer a-secret-word2"}, {"Authorization": "Bearer"})  # fmt: skip
    with httpx.Client(base_url=locked.url, verify=False) as stranger:
        for headers in wrong:
            answer = stranger.request(method, path, headers=headers, json={} if method == "POST" else None)
            assert check_error(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        headers = {"Authorization": "bearer a-secret-word"}
        assert stranger.request(method, path, headers=headers).status_code in (200, 400)


def test_health_wants_no_key_and_the_client_has_it(locked):
    assert httpx.get(f"{locked.url}/health").status_code == 200
    assert locked.openai.completions.create(model=NAME, prompt="a", max_tokens=2).choices[0].text is not None
    assert locked.metric("request_errors_total", status="401") > 0
    # A body is not read from a stranger.
    with httpx.Client(base_url=locked.url, verify=False) as stranger:
        check_error(stranger.post(COMPLETIONS, content=b"{" * 2**20), 401)


def test_the_engines_bugs_are_not_told(server, monkeypatch):
    """A request that fails says so, and others go on."""

    def out_of_luck(*_, **__):
        raise RuntimeError("out of luck: /secret/path")

    monkeypatch.setattr(server.thread.engine.executor, "submit", out_of_luck)
    error = check_error(server.post(COMPLETIONS, prompt="a", max_tokens=3), 500)
    assert "secret" not in error["message"]
    streamed = server.post(COMPLETIONS, prompt="a", max_tokens=3, stream=True).text
    assert '"error"' in streamed
    assert "secret" not in streamed
    monkeypatch.undo()
    assert server.post(COMPLETIONS, prompt="a", max_tokens=3).status_code == 200
    with monkeypatch.context() as patch:  # in one answer's text
        patch.setattr("accessory.model.writing.StopScanner.push", out_of_luck)
        check_error(server.post(COMPLETIONS, prompt="a", max_tokens=3), 500)
    assert server.post(COMPLETIONS, prompt="a", max_tokens=3).status_code == 200
    server.settle()
