"""`accessory serve --page`: visitors of the page and callers of the API share one engine, and one key."""

from __future__ import annotations

import base64
import sys
import time
from pathlib import Path

import httpx
import pytest
from helpers import browser as web
from helpers.serving import check_error, serving

from accessory.cli import main

needs_browser = pytest.mark.skipif(web.missing() is not None, reason=str(web.missing()))
ROOT = Path(__file__).parents[2]
KEY = "a-secret-word"
LONG = 900  # tokens: an answer that goes on while others are given


def started(folders, tmp_path_factory, *words):
    log = tmp_path_factory.mktemp("page") / "log"
    how = ["--device", "cpu", "--dtype", "fp32", "--max-seq-len", "1024", "--port", "0", "--page"]
    how += ["--adapter", f"pirate={folders[1]}"]
    command = [sys.executable, "-m", "accessory", "serve", str(folders[0]), *how, *words]
    return web.Served(command, ROOT, log)


@pytest.fixture(scope="module", params=["with a key", pytest.param("without", marks=pytest.mark.slow)])
def served(folders, tmp_path_factory, request):
    """A server, what a browser gives for its key, and the headers of a caller."""
    if request.param == "without":
        server, given, headers = started(folders, tmp_path_factory), {}, {}
    else:
        key = tmp_path_factory.mktemp("key") / "key"
        key.write_text(KEY)
        server = started(folders, tmp_path_factory, "--api-key-file", str(key))
        given = {"http_credentials": {"username": "anybody", "password": KEY}}
        headers = {"Authorization": f"Bearer {KEY}"}
    yield server, given, headers
    server.kill()


@pytest.fixture(scope="module")
def browser():
    with web.chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(model):
    """An application that stands for the page: it says which address it was asked for."""

    async def told(scope, receive, send):
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"page " + scope["path"].encode()})

    return told


def basic(word, name="anybody"):
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{word}".encode()).decode()}


@pytest.mark.slow
@needs_browser
def test_visitors_and_callers_are_answered_at_once(served, folders, browser):
    """While one visitor's answer is written, another visitor's and a caller's begin and end."""
    server, given, headers = served
    first, second = (web.Visitor(browser, server.url, **given) for _ in range(2))
    first.set("max_gen_len", LONG)
    first.ask("Tell me all", wait="Writing")
    second.set("max_gen_len", 8)
    second.ask("What is a router?")
    assert [who for who, _ in second.rounds()] == ["user", "bot"]
    body = {"model": folders[0].name, "prompt": "A", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{server.url}v1/completions", json=body, headers=headers, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 8
    running = [
        line
        for line in httpx.get(f"{server.url}metrics", headers=headers).text.splitlines()
        if line.startswith("accessory:num_requests_r")
    ]
    assert running == ["accessory:num_requests_running 1.0"]  # the engine is one: the first visitor is still in it
    first.grows()
    first.press("stop")
    first.status("Stopped after")
    # A page fetches nothing from elsewhere.
    assert {url for url in first.fetched if not url.startswith((server.url, "data:", "blob:"))} == set()
    for visitor in (first, second):
        visitor.leave()


@needs_browser
def test_the_key_is_the_pages_password(served, browser):
    server, given, _ = served
    if not given:
        pytest.skip("there is no key")
    visitor = web.Visitor(browser, server.url, **given)
    visitor.set("max_gen_len", 8)
    visitor.ask("What is a router?")
    assert len(visitor.rounds()) == 2
    visitor.leave()
    for path in ("", "config", "gradio_api/info", "gradio_api/queue/data?session_hash=a", "theme.css", "login"):
        assert httpx.get(server.url + path).status_code == 401, path
    assert httpx.post(f"{server.url}gradio_api/upload", files={"files": b"a"}).status_code == 401


@needs_browser
@pytest.mark.slow
def test_a_visitor_chooses_an_adapter(served, folders, browser):
    """The page gives what the API gives for the same adapter."""
    server, given, headers = served
    visitor = web.Visitor(browser, server.url, **given)
    visitor.set("max_gen_len", 12)
    assert visitor.options("adapter") == ["none: the model itself", "pirate"]
    texts = {}
    for name in (folders[0].name, "pirate"):
        if name == "pirate":
            visitor.choose("adapter", name)
        visitor.ask("Tell me all")
        texts[name] = visitor.rounds()[1][1]
        visitor.press("clear")
        body = {"model": name, "messages": [{"role": "user", "content": "Tell me all"}], "max_tokens": 12}
        answer = httpx.post(f"{server.url}v1/chat/completions", json=body | {"temperature": 0}, headers=headers).json()
        assert texts[name].split() == answer["choices"][0]["message"]["content"].split()
    assert len(set(texts.values())) == 2
    visitor.leave()


@needs_browser
@pytest.mark.slow
def test_a_signal_ends_it_while_a_visitor_looks_on(served, browser):
    server, given, _ = served
    visitor = web.Visitor(browser, server.url, **given)
    visitor.set("max_gen_len", LONG)
    visitor.ask("Tell me all", wait="Writing")
    begun = time.monotonic()
    assert server.interrupt() < 10
    assert server.process.returncode == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()
    assert time.monotonic() - begun < 10
    visitor.leave()


def test_the_api_keeps_its_addresses(model, page):
    with serving(model, page=page) as server:
        assert server.raw.get("/").text == "page /"
        assert server.raw.get("/gradio_api/x").text == "page /gradio_api/x"
        assert server.raw.get("/health").json() == {"status": "ok"}
        check_error(server.raw.get("/v1/nothing"), 404)
        check_error(server.raw.get("/v1/completions"), 405)
        assert server.post("/v1/completions", prompt="A", max_tokens=2).status_code == 200


def test_a_page_takes_the_key_as_a_password_and_the_api_does_not(model, page):
    with serving(model, page=page, api_key=KEY) as server:
        stranger = httpx.Client(base_url=server.url)
        for headers in ({}, basic("wrong"), basic(KEY + "2"), basic(""), {"Authorization": "Basic !"}, basic("x", KEY)):
            refused = stranger.get("/", headers=headers)
            assert check_error(refused, 401, None, "password")["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"].startswith("Basic realm=")
        assert stranger.get("/", headers=basic(KEY)).text == "page /"
        assert server.raw.get("/").text == "page /"
        api = stranger.get("/v1/models", headers=basic(KEY))
        assert check_error(api, 401, None, "Bearer KEY")
        assert api.headers["www-authenticate"] == "Bearer"


def test_without_gradio_the_pip_line_is_the_answer(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["serve", str(folders[0]), "--port", "0", "--page"]) == 1
    assert (
        capsys.readouterr().err.strip()
        == "accessory: error: the pages need Gradio: pip install 'mixtral-accessory[demo]'"
    )


def test_the_page_begins_with_the_servers_template(model):
    pytest.importorskip("gradio", reason="needs gradio: pip install gradio")
    from accessory.server.page import import_gradio
    from accessory.server.page_kinds import served_dialogue

    import_gradio()
    for chosen, expected in ((None, "default"), ("chatml", "chatml")):
        template, _ = served_dialogue(chosen, images=False).settings(model.tokenizer)
        assert template.value == expected
