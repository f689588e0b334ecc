"""`accessory chat --url`, against a server in this process and against servers that fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from helpers.command_line import standard_input, write_hf

from accessory.cli import main
from accessory.commands.api_client import Server
from accessory.data.templates import get_template
from accessory.model.meta import MetaModel

pytest.importorskip("fastapi", reason="the server's packages are not installed")
from helpers.live_server import running, serving

KEY = "secret-1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("remote") / "hf")


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, key=KEY, dtype=torch.float32, max_seq_len=128) as found:
        yield found


@pytest.fixture
def chat(server, monkeypatch, capsys):
    """Type some lines into a chat with the server; returns the status, and what was printed."""

    def run(typed: str, *options: str, url: str = server[0], key: str | None = KEY):
        if key is None:
            monkeypatch.delenv("ACCESSORY_API_KEY", raising=False)
        else:
            monkeypatch.setenv("ACCESSORY_API_KEY", key)
        standard_input(monkeypatch, typed)
        status = main(["chat", "--url", url, *options])
        return status, *capsys.readouterr()

    return run


def test_it_says_what_the_model_says_here_and_remembers(chat, server, folder):
    model = MetaModel.from_pretrained(folder, dtype=torch.float32, device="cpu", max_seq_len=128)
    template = get_template(None, model.tokenizer)
    messages, answers = [{"role": "system", "content": "Be brief."}], []
    for question in ("Hello", "Why?"):
        messages.append({"role": "user", "content": question})
        ids = template.prompt_ids(messages, model.tokenizer)
        said = model.complete([ids], max_gen_len=5, additional_stop_symbols=template.stop_strings)[0].text
        answers.append(template.reply(said))
        messages.append({"role": "assistant", "content": answers[-1]})
    how = ("--max-gen-len", "5", "--system", "Be brief.")
    status, out, err = chat("Hello\nWhy?\n/quit\n", *how, url=server[0] + "/v1")
    assert (status, err) == (0, "")
    assert out.startswith(f"tiny at {server[0]}/v1. /undo")
    assert out.split("\n> ")[1:] == [answers[0] + "\n", answers[1] + "\n", ""]


def test_sampling_options_reach_the_server(chat, server, monkeypatch):
    seen = []
    submit = server[1].thread.submit
    monkeypatch.setattr(
        server[1].thread, "submit", lambda requests, loop: seen.extend(requests) or submit(requests, loop)
    )
    options = ("--temperature", "0.5", "--top-p", "0.9", "--top-k", "7", "--min-p", "0.1", "--seed", "3")
    chat("Hello\n", *options, "--repetition-penalty", "1.5", "--stop", "END", "--max-gen-len", "2")
    params = seen[0].params
    found = (params.temperature, params.top_p, params.top_k, params.min_p, params.seed, params.repetition_penalty)
    assert found == (0.5, 0.9, 7, 0.1, 3, 1.5)
    assert "END" in seen[0].stops
    assert seen[0].max_gen_len == 2


def test_a_terminal_shows_how_many_tokens_the_server_counts(chat, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    out = chat("Hello\n/set max-gen-len 3\nHello\n", "--max-gen-len", "5")[1].split("\n> ")
    assert "5 tokens, " in out[1].splitlines()[-1]
    assert "3 tokens, " in out[3].splitlines()[-1]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"url": "http://127.0.0.1:9"}, "--url: nothing answers at http://127.0.0.1:9"),
        ({"url": "ftp://x"}, "--url: got 'ftp://x', but it must be http://host:port"),
        ({"url": "http://x:y"}, "--url: got 'http://x:y'"),
        ({"key": None}, "wants a key; give its own there or in ACCESSORY_API_KEY"),
        ({"key": "another"}, "refuses the key"),
        ({"options": ["--model", "huge"]}, "--model: got 'huge', but http://"),
        ({"options": ["--api-key-file", "nowhere"]}, "nowhere: No such file"),
        ({"options": ["--use-adapter", "a"]}, "--use-adapter: a server has adapters as models; give --model a"),
        ({"options": ["--n-gpus", "2"]}, "--n-gpus: it is for a model that is loaded here"),
        ({"options": ["--template", "mistral"]}, "--template: it is for a model that is loaded here"),
        ({"options": ["--image", "x.png"]}, "--image: it is for a model that is loaded here"),
        ({"options": ["--quant", "int8"]}, "--quant: it is for a model that is loaded here"),
        ({"options": ["--max-gen-len", "0"]}, "--max-gen-len: got 0"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_mistake_is_one_line(chat, how, said):
    options = how.pop("options", [])
    status, out, err = chat("Hello\n", *options, **how)
    assert (status, out) == (1, "")
    assert err.startswith("accessory: error: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "chat: there is no model; give a PATH, or --url"),
        (["--model", "tiny", "FOLDER"], "--model: it is for a server's model; give --url too"),
        (["FOLDER", "--url", "http://127.0.0.1:9"], "--url: the PATH"),
    ],
)
def test_a_model_has_one_place(folder, capsys, words, said):
    assert main(["chat", *(str(folder) if word == "FOLDER" else word for word in words)]) == 1
    assert said in capsys.readouterr().err


def test_what_the_server_refuses_ends_the_round_and_not_the_chat(chat):
    status, out, err = chat("long " * 200 + "\nHello\n", "--max-gen-len", "2")
    assert (status, err) == (0, "")
    assert "status 400: This model's maximum context length is 128 tokens" in out
    assert "the round is forgotten" in out.split("\n> ")[1]
    assert "forgotten" not in out.split("\n> ")[2]


def test_ctrl_c_stops_the_answer_on_the_server_too(chat, server, monkeypatch):
    events = Server.stream

    def interrupted(*asked):
        whole = events(*asked)
        try:
            yield next(whole)
            raise KeyboardInterrupt
        finally:
            whole.close()

    monkeypatch.setattr(Server, "stream", interrupted)
    status, out, _ = chat("Hello\n")
    assert status == 0
    assert "(stopped; the round is forgotten)" in out
    scheduler, until = server[1].thread.engine.scheduler, time.monotonic() + 10
    while (scheduler.running or scheduler.waiting) and time.monotonic() < until:
        time.sleep(0.01)
    assert not scheduler.running
    assert not scheduler.waiting


def broken(*events: str):
    """A server whose answers are these lines and no more."""

    async def app(scope, receive, send):
        if scope["path"] == "/v1/models":
            lines, kind = [json.dumps({"data": [{"id": "a", "parent": None}, {"id": "b", "parent": "a"}]})], b"json"
        else:
            lines, kind = [f"data: {event}\n\n" for event in events], b"event-stream"
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for line in lines:
            await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


PIECE = json.dumps({"choices": [{"delta": {"content": "half"}}]})


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([PIECE], "broke the answer off"),
        ([PIECE, json.dumps({"error": {"message": "rank 1 died"}}), "[DONE]"], "with an error: rank 1 died"),
        ([PIECE, "{"], "it does not answer in JSON"),
    ],
)
def test_an_error_in_the_middle_of_an_answer_is_one_line(chat, events, said):
    with running(broken(*events)) as url:
        status, out, err = chat("Hello\n", url=url)
    assert (status, err) == (0, "")
    assert out.split("\n> ")[1].startswith("half\n(")
    assert said in out
    assert "the round is forgotten" in out


def test_a_page_is_no_server_of_models(chat):
    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"<html>"})

    with running(page) as url:
        assert "is no server of OpenAI's API" in chat("", url=url)[2]


def test_torch_is_not_imported(server):
    program = (
        "import sys; from accessory.cli import main; status = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    words = [sys.executable, "-c", program, "chat", "--url", server[0], "--max-gen-len", "2"]
    done = subprocess.run(
        words, input="Hello\n", capture_output=True, text=True, timeout=60, env={"ACCESSORY_API_KEY": KEY, "PATH": ""}
    )
    assert (done.returncode, done.stderr) == (0, "")
