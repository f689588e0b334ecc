"""`accessory bench`: its figures on records written by hand, and loads on a server in this process."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from helpers.command_line import write_hf

from accessory.cli import main
from accessory.commands.bench_figures import figures, spread
from accessory.commands.bench_load import Record, poisson_gaps

pytest.importorskip("fastapi", reason="the server's packages are not installed")
from helpers.live_server import serving


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = write_hf(tmp_path_factory.mktemp("bench") / "hf")
    with serving(folder, dtype=torch.float32, max_seq_len=256) as found:
        yield found


@pytest.fixture
def bench(server, capsys, tmp_path):
    """Run the command; returns the status, what it wrote into --out, and what it printed."""

    def run(*options: str, url: str = server[0]):
        out = tmp_path / "out.json"
        status = main(["bench", url, "--what", "serve", "--out", str(out), *options])
        return status, json.loads(out.read_text()) if out.exists() else None, *capsys.readouterr()

    return run


# --------------------------------------------------------------------------- figures


def test_percentiles_of_a_known_list():
    found = spread([value / 100 for value in range(101)])
    assert {key: round(value, 9) for key, value in found.items()} == {
        "p50": 0.5, "p90": 0.9, "p99": 0.99, "mean": 0.5, "max": 1.0,
    }  # fmt: skip
    assert spread([]) is None


def test_figures_of_records_written_by_hand():
    records = [
        Record(0, sent=1.0, pieces=[1.5, 2.0, 2.25], ended=2.5, prompt_tokens=10, cached_tokens=4, tokens=4),
        Record(1, sent=2.0, pieces=[5.0], ended=5.0, prompt_tokens=20, tokens=1),
        Record(2, sent=2.0, ended=2.1, error="full"),
    ]
    found = figures(records)
    assert (found["requests"], found["errors"], found["error_messages"]) == (3, 1, {"full": 1})
    assert found["seconds"] == 4.0
    assert (found["prompt_tokens"], found["cached_tokens"], found["output_tokens"]) == (30, 4, 5)
    assert (found["prompt_tokens_per_second"], found["output_tokens_per_second"]) == (7.5, 1.25)
    assert found["requests_per_second"] == 0.5
    assert found["time_to_first_token"]["p50"] == (0.5 + 3.0) / 2
    assert found["time_per_output_token"]["max"] == 0.75 / 3
    assert found["time_between_pieces"]["mean"] == (0.5 + 0.25) / 2
    assert found["time_to_end"]["max"] == 3.0


def test_nothing_measured_has_figures_too():
    found = figures([])
    assert (found["requests"], found["seconds"], found["time_to_end"]) == (0, 0.0, None)


def test_arrivals_are_a_poisson_process():
    gaps = list(itertools.islice(poisson_gaps(4.0, seed=1), 20_000))
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(1 / 4, rel=0.03)
    assert variance == pytest.approx(1 / 16, rel=0.06)  # an exponential's deviation is its mean


# --------------------------------------------------------------------------- loads


@pytest.mark.parametrize("how", [["--clients", "3"], ["--rate", "40"]], ids=lambda how: how[0])
def test_a_load_adds_up(bench, server, how):
    before = server[1].thread.engine.scheduler.counts.drawn_tokens
    status, found, out, err = bench("--requests", "6", "--prompt-tokens", "20", "--max-tokens", "5", *how)
    assert status == 0
    assert "accessory: " not in err
    figures_, records = found["figures"], found["records"]
    assert [record["number"] for record in records] == list(range(6))
    assert all((r["prompt_tokens"], r["tokens"], r["error"]) == (20, 5, None) for r in records)
    assert all(r["sent"] <= r["pieces"][0] <= r["pieces"][-1] <= r["ended"] for r in records)
    assert (figures_["requests"], figures_["prompt_tokens"], figures_["output_tokens"]) == (6, 120, 30)
    tokens = figures_["output_tokens_per_second"] * figures_["seconds"]
    assert tokens == pytest.approx(30)
    # The server counts the same, and one request more that comes before all others.
    assert server[1].thread.engine.scheduler.counts.drawn_tokens - before == 35
    assert out.startswith(f"tiny at {server[0]}: 6 requests, ")
    assert not found["interrupted"]
    assert {"to the first token", "to the end"} <= {line[:20].strip() for line in out.splitlines()}


def test_a_shared_beginning_is_computed_once(bench):
    how = ("--clients", "1", "--requests", "3", "--prompt-tokens", "140", "--max-tokens", "1")
    _, shared, *_ = bench(*how, "--shared-prefix", "130", "--seed", "5")
    assert [record["cached_tokens"] for record in shared["records"]] == [128] * 3  # two pages of 64
    _, alone, *_ = bench(*how, "--seed", "6")
    assert alone["figures"]["cached_tokens"] == 0


def test_one_seed_is_one_load(bench, server, monkeypatch):
    prompts, submit = [], server[1].thread.submit

    def noting(requests, loop):
        prompts.extend(request.prompt for request in requests)
        return submit(requests, loop)

    monkeypatch.setattr(server[1].thread, "submit", noting)
    for seed in ("7", "7", "8"):
        bench("--clients", "1", "--requests", "2", "--prompt-tokens", "9", "--max-tokens", "1", "--seed", seed)
    first, again, other = prompts[:3], prompts[3:6], prompts[6:]
    assert first == again
    assert first != other
    assert all(len(prompt) == 9 for prompt in prompts)


def test_errors_are_counted_and_named(bench, server, monkeypatch):
    submit, asked = server[1].thread.submit, []

    def refusing(requests, loop):
        asked.append(requests)
        if len(asked) in (3, 4):
            from accessory.errors import BusyError

            raise BusyError("the queue is full")
        return submit(requests, loop)

    monkeypatch.setattr(server[1].thread, "submit", refusing)
    status, found, out, _ = bench("--clients", "1", "--requests", "5", "--prompt-tokens", "9", "--max-tokens", "2")
    assert status == 1
    assert (found["figures"]["requests"], found["figures"]["errors"], found["figures"]["output_tokens"]) == (5, 2, 6)
    assert "2 errors" in out
    assert "errors: 2 × " in out
    assert "the queue is full" in out


def test_the_plot_is_a_page_that_needs_no_network(bench, tmp_path):
    pytest.importorskip("bokeh", reason="Bokeh is not installed")
    page = tmp_path / "plot.html"
    assert bench("--requests", "2", "--prompt-tokens", "9", "--max-tokens", "3", "--plot", str(page))[0] == 0
    text = page.read_text(encoding="utf-8")
    assert "to the first token, milliseconds" in text
    assert "tiny at http://127.0.0.1" in text
    assert not re.search(r'<(?:script|link)[^>]*="http', text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--requests", "0"], "--requests: got 0, but it must be at least 1"),
        (["--rate", "0"], "--rate: got 0.0"),
        (["--rate", "nan"], "--rate: got nan"),
        (["--clients", "0"], "--clients: got 0"),
        (["--shared-prefix", "128"], "--shared-prefix: got 128, but it must be less than --prompt-tokens, 128"),
        (["--plot", "x.png"], "--plot: got x.png, but Bokeh draws into a page"),
        (["--plot", "nowhere/x.html"], "--plot: nowhere/x.html cannot be written"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--model", "huge"], "--model: got 'huge'"),
        (["--prompt-tokens", "250", "--max-tokens", "20"], "status 400: This model's maximum context length is 256"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_mistake_is_one_line(bench, options, said):
    status, found, out, err = bench(*options)
    assert (status, found, out) == (1, None, "")
    assert err.startswith("accessory: error: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_server_that_is_not_there_is_one_line(bench):
    assert "URL: nothing answers at http://127.0.0.1:9" in bench(url="http://127.0.0.1:9")[3]


def test_ctrl_c_keeps_what_was_measured(server, tmp_path):
    out = tmp_path / "out.json"
    program = "import sys; from accessory.cli import main; sys.exit(main(sys.argv[1:]))"
    how = ["--what", "serve", "--clients", "1", "--requests", "100000", "--prompt-tokens", "9", "--max-tokens", "2"]
    command = [sys.executable, "-c", program, "bench", server[0], *how, "--out", str(out)]
    counts = server[1].thread.engine.scheduler.counts
    until = counts.drawn_tokens + 20
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while counts.drawn_tokens < until and running.poll() is None:
            pass
        os.kill(running.pid, signal.SIGINT)
        printed, err = running.communicate(timeout=30)
    assert running.returncode == 130, err
    assert "interrupted" in err
    assert "to the first token" in printed
    found = json.loads(out.read_text())
    assert found["interrupted"]
    assert len(found["records"]) == found["figures"]["requests"] >= 7
