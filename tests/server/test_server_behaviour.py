"""Many visitors at once: those who leave, those who read slowly, and those who find the queue full."""

from __future__ import annotations

import gc
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from helpers.serving import NAME, check_error, eventually
from helpers.traffic import check_empty

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "A", "max_tokens": 240, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def slow(server, monkeypatch):
    """Steps take at least 20 ms."""
    submit = server.thread.engine.executor.submit

    def later(plan):
        time.sleep(0.02)
        return submit(plan)

    monkeypatch.setattr(server.thread.engine.executor, "submit", later)
    yield
    server.settle(60)


def opened(server, body, *, receive_buffer: int | None = None) -> socket.socket:
    """A connection that has sent a request and reads nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((host, int(port)))
    content = json.dumps({"model": NAME, **body}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_who_leaves_frees_pages(server, slow, stream, n, caplog):
    scheduler = server.thread.engine.scheduler
    connection = opened(server, {**LONG, "stream": stream, "n": n})
    eventually(lambda: len(scheduler.running) == n)
    if stream:
        assert connection.recv(100)
    drawn = scheduler.counts.drawn_tokens
    connection.close()
    eventually(lambda: not scheduler.running, 2)
    assert scheduler.counts.drawn_tokens - drawn < 20 * n  # of 240
    assert server.metric("request_success_total", finished_reason="abort") >= n
    server.settle()
    gc.collect()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_who_leaves_while_waiting_is_forgotten(server, slow, monkeypatch):
    scheduler = server.thread.engine.scheduler
    monkeypatch.setattr(scheduler, "_slots", scheduler._slots[:1])
    first = opened(server, LONG)
    eventually(lambda: len(scheduler.running) == 1)
    second = opened(server, LONG)
    eventually(lambda: len(scheduler.waiting) == 1)
    second.close()
    eventually(lambda: not scheduler.waiting, 2)
    assert len(scheduler.running) == 1
    first.close()
    eventually(lambda: not server.thread._open, 2)
    monkeypatch.undo()
    scheduler._slots = list(range(scheduler.max_running))[::-1]
    check_empty(server.thread.engine)


def test_nobody_waits_for_a_step(server, monkeypatch):
    """Health is told, requests are refused, and visitors leave, while a step takes a second."""
    submit = server.thread.engine.executor.submit
    begins, goes_on = threading.Event(), threading.Event()

    def stuck(plan):
        begins.set()
        assert goes_on.wait(30)
        return submit(plan)

    monkeypatch.setattr(server.thread.engine.executor, "submit", stuck)
    connections = [opened(server, {**LONG, "stream": stream}) for stream in (True, False)]
    assert begins.wait(30)
    for connection in connections:
        connection.close()
    time.sleep(0.05)
    begun = time.monotonic()
    assert server.raw.get("/health").json() == {"status": "ok"}
    assert server.metric("num_requests_running") >= 1
    check_error(server.post(COMPLETIONS, prompt=""), 400, "prompt")
    assert server.raw.post("/tokenize", json={"prompt": "A"}).status_code == 200
    assert time.monotonic() - begun < 2
    goes_on.set()
    server.settle(5)


def test_requests_that_come_together_have_one_first_step(server, monkeypatch):
    """Without that, the second would wait until the first one's step has ended."""
    monkeypatch.setattr("accessory.server.answers.APART", 0.5)
    monkeypatch.setattr("accessory.server.answers.GATHERING", 5.0)
    begun, submit = [], server.thread.engine.executor.submit

    def noted(plan):
        begun.append(sum(entry.begin is not None for entry in plan.entries))
        return submit(plan)

    monkeypatch.setattr(server.thread.engine.executor, "submit", noted)
    with ThreadPoolExecutor(3) as pool:
        each = [pool.submit(server.post, COMPLETIONS, prompt="A", max_tokens=2) for _ in range(3)]
    assert [answer.result().status_code for answer in each] == [200] * 3
    assert begun[0] == 3


def test_two_visitors_progress_together(server, slow):
    """The second one, who comes later and wants less, ends first; neither waits for the other."""
    expected = server.model.generate(["A"], max_gen_len=60)[0]
    times: dict[str, list[float]] = {"first": [], "second": []}
    texts = dict.fromkeys(times, "")

    def read(name, most):
        stream = server.openai.completions.create(model=NAME, prompt="A", max_tokens=most, temperature=0, stream=True)
        for chunk in stream:
            times[name].append(time.monotonic())
            texts[name] += chunk.choices[0].text

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, "first", 60)
        eventually(lambda: len(times["first"]) > 3)
        asked = time.monotonic()
        pool.submit(read, "second", 10).result(60)
        assert times["second"][0] - asked < 0.5  # it need not wait longer than some steps
        assert not first.done()
        first.result(60)
    assert texts["first"] == expected
    assert expected.startswith(texts["second"])


def test_a_slow_reader_holds_up_nobody(server):
    """It reads nothing of answers that do not fit any buffer, and then everything."""
    body = {**LONG, "stream": True, "n": 16, "logprobs": 20, "max_tokens": 120}
    connection = opened(server, body, receive_buffer=4096)
    expected = server.model.generate(["B"], max_gen_len=20)[0]
    for _ in range(3):
        answer = server.post(COMPLETIONS, prompt="B", max_tokens=20, temperature=0)
        assert answer.json()["choices"][0]["text"] == expected
    server.settle(60)  # its answers are written, and its pages are free
    received = b""
    connection.settimeout(20)
    while b"[DONE]" not in received[-200:]:
        more = connection.recv(2**20)
        assert more
        received += more
    connection.close()
    assert received.count(b'"finish_reason": "length"') == 16


def test_a_full_queue_says_so(server, slow, monkeypatch):
    scheduler = server.thread.engine.scheduler
    monkeypatch.setattr(scheduler, "max_waiting", 4)
    monkeypatch.setattr(scheduler, "_slots", scheduler._slots[:1])
    connections = [opened(server, LONG)]
    eventually(lambda: len(scheduler.running) == 1)
    connections.append(opened(server, {**LONG, "n": 4}))
    eventually(lambda: len(scheduler.waiting) == 4)
    for body in (LONG, {**LONG, "stream": True}):
        answer = server.post(COMPLETIONS, **body)
        assert check_error(answer, 503)["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
    assert server.metric("num_requests_waiting") == 4
    for connection in connections:
        connection.close()
    eventually(lambda: not server.thread._open)
    monkeypatch.undo()
    scheduler._slots = list(range(scheduler.max_running))[::-1]
    assert server.post(COMPLETIONS, prompt="A", max_tokens=2).status_code == 200


def test_a_crowd_gets_what_each_gets_alone(server):
    prompts = [f"{word} number {n}" for n, word in enumerate(["One", "Zwei", "trois"] * 8)]
    expected = server.model.generate(prompts, max_gen_len=20)

    def ask(number):
        with httpx.Client(base_url=server.url, timeout=60) as client:
            body = {"model": NAME, "prompt": prompts[number], "max_tokens": 20, "temperature": 0}
            return client.post(COMPLETIONS, json=body).json()["choices"][0]["text"]

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, range(24))) == expected
    server.settle()


@pytest.mark.slow
def test_an_idle_connection_stays_open(server):
    """For longer than uvicorn's own 5 seconds."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5.5) as connection:
        for _ in range(2):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            said = b""
            while not said.endswith(b'{"status":"ok"}'):
                said += connection.recv(1000)
            with pytest.raises(TimeoutError):
                connection.recv(1)
