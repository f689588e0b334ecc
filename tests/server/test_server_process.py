"""`accessory serve` as a process, and what it refuses before a model is loaded."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import httpx
import pytest
from helpers.serving import eventually

from accessory.cli import main
from accessory.errors import InputError


@pytest.fixture
def never_loaded(monkeypatch):
    """Loading a model is an error."""

    def loads(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("accessory.commands.serve.open_model", loads)


def refused(capsys, *words):
    """The one line with which `accessory serve` ends."""
    assert main(["serve", *map(str, words)]) not in (0, None)
    err = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(err)
    return err[-1]


def test_a_port_in_use(never_loaded, folders, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused(capsys, folders[0], "--port", port)
    assert "--port" in line
    assert str(port) in line


def test_of_two_servers_that_load_at_once_one_has_the_port(folders):
    """The first one's socket listens before its model is loaded."""
    from accessory.server.running import listen

    with listen("127.0.0.1", 0) as first, pytest.raises(OSError, match="in use"):
        listen(*first.getsockname())


def test_a_host_of_another_machine(never_loaded, folders, capsys):
    assert "192.0.2.1" in refused(capsys, folders[0], "--host", "192.0.2.1", "--port", 0)


@pytest.mark.parametrize(
    "content", [None, b"", b"\n\n", b"two words\n", b"\xff\xfe\x00", "schlüssel\n".encode()], ids=str
)
def test_key_files_without_a_key(never_loaded, folders, capsys, tmp_path, content):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refused(capsys, folders[0], "--port", 0, "--api-key-file", path)


def test_the_first_line_of_a_key_file_is_the_key(tmp_path):
    from accessory.commands.api_client import read_key

    (tmp_path / "key").write_text("a-word\na comment\n")
    assert read_key(str(tmp_path / "key")) == "a-word"


def test_an_open_host_without_a_key_warns(folders, monkeypatch, caplog, capsys):
    from contextlib import contextmanager

    @contextmanager
    def no_model(*_):
        yield None

    monkeypatch.setattr("accessory.commands.serve.open_model", no_model)
    monkeypatch.delenv("ACCESSORY_API_KEY", raising=False)
    for words, warns in (
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key", "word"], False),
        (["--host", "127.0.0.1"], False),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            main(["serve", str(folders[0]), "--port", "0", *words])
        said = caplog.text + capsys.readouterr().err
        assert ("--api-key-file" in said) == warns


@pytest.mark.parametrize(("words", "warms"), [([], True), (["--no-warm-up"], False), (["--no_warm_up"], False)])
def test_a_model_is_warmed_up_before_the_server_begins(folders, monkeypatch, capsys, words, warms):
    did = []

    class Model:
        def warm_up(self, progress):
            assert progress
            did.append("warm up")

        def engine(self):
            did.append("begin")
            raise InputError("that is enough")

    monkeypatch.setattr("accessory.commands.serve.open_model", lambda *_: nullcontext(Model()))
    assert refused(capsys, folders[0], "--port", 0, *words).endswith("that is enough")
    assert did == ["warm up", "begin"][not warms :]


def started(folder, *words):
    """The process, and its address."""
    command = [
        sys.executable,
        "-m",
        "accessory",
        "serve",
        str(folder),
        "--port",
        "0",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
    ]
    process = subprocess.Popen(
        [*command, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    line = process.stdout.readline()
    assert "answers at" in line, process.stderr.read()
    return process, line.split("answers at ")[1].split("/v1")[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_what_is_open_has_ended(folders, number):
    process, url = started(folders[0], "--max-seq-len", "512", "--shutdown-timeout", "60")
    try:
        name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        assert name == folders[0].name
        body = {"model": name, "prompt": "A", "max_tokens": 480, "ignore_eos": True, "stream": True}
        pieces = []

        def read():
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                pieces.extend(answer.iter_lines())

        reader = threading.Thread(target=read)
        reader.start()
        eventually(lambda: pieces)
        process.send_signal(number)
        time.sleep(0.5)
        if process.poll() is None and reader.is_alive():
            with pytest.raises(httpx.HTTPError):
                httpx.get(f"{url}/health", timeout=2)
        reader.join(60)
        assert [line for line in pieces if line][-1] == "data: [DONE]"
        assert any('"finish_reason": "length"' in line for line in pieces)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


@pytest.mark.slow
def test_patience_has_an_end(folders):
    process, url = started(folders[0], "--max-seq-len", "4096", "--shutdown-timeout", "0.4")
    try:
        body = {"model": folders[0].name, "prompt": "A", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            assert process.wait(20) == 0
            assert time.monotonic() - begun < 10
    finally:
        process.kill()
