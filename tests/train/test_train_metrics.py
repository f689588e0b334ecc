"""`metrics.jsonl` stays one curve after kills and resumes; what a run prints; when it warns about the router."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.errors import ConfigError, InputError
from accessory.train.metrics import METRICS_FILE, MetricsLog, iterate_metrics, read_metrics
from accessory.train.progress import Progress, RouterWatch, duration, short


def train(step: int, **changes: object) -> dict[str, object]:
    record = {
        "kind": "train",
        "step": step,
        "epoch": step / 100,
        "samples": 8 * step,
        "tokens": 1000 * step,
        "loss": 2.0 + 1.0 / step,
        "balance": 1.02,
        "z": 3.0,
        "lr": 5e-6,
        "grad_norm": 1.5,
        "tokens_per_s": 12345.6,
        "step_s": 0.5,
        "memory_gb": 23.45,
        "layers": {
            "balance": [1.01, 1.03],
            "entropy": [1.3, 1.2],
            "largest": [0.3, 0.4],
            "share": [[0.3, 0.2, 0.25, 0.25], [0.4, 0.2, 0.2, 0.2]],
        },
    }
    return {**record, **changes}


def steps(folder) -> list[int]:
    return [record["step"] for record in read_metrics(folder)]


# --------------------------------------------------------------------------- the file


def test_what_is_written_is_read(tmp_path):
    written = [train(1), train(2), {"kind": "eval", "step": 2, "loss": 1.75, "tokens": 99}]
    with MetricsLog(tmp_path / "new" / "folder") as log:
        for n, record in enumerate(written, start=1):
            log.write(record)
            assert read_metrics(tmp_path / "new" / "folder") == written[:n]  # each line at once, not at the end
    log.close()


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=4, max_size=4), st.integers(1, 10**9))
@settings(max_examples=50, deadline=None)
def test_every_line_is_strict_json_and_finite_numbers_are_exact(tmp_path_factory, values, step):
    folder = tmp_path_factory.mktemp("strict")
    with MetricsLog(folder) as log:
        log.write(train(step, loss=values[0], z=values[1], layers={"share": [values[2:]]}))
    line = (folder / METRICS_FILE).read_text()
    assert line.count("\n") == 1

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    json.loads(line, parse_constant=refuse)
    (record,) = read_metrics(folder)
    for key, value in zip(("loss", "z"), values, strict=False):
        assert record[key] == value if math.isfinite(value) else math.isnan(record[key])
    for value, seen in zip(values[2:], record["layers"]["share"][0], strict=True):
        assert abs(value - seen) <= 5.1e-8 + 1e-15 * abs(value) if math.isfinite(value) else math.isnan(seen)


def test_tensors_and_arrays_are_numbers_too(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(train(np.int64(3), loss=torch.tensor(0.5), layers={"share": torch.full((2, 4), 0.25)}))
    (record,) = read_metrics(tmp_path)
    assert (record["step"], record["loss"], record["layers"]["share"]) == (3, 0.5, [[0.25] * 4] * 2)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_file_cut_anywhere_is_read_and_resumed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    records = [train(1), train(2), {"kind": "eval", "step": 2, "loss": 1.0, "tokens": 9}, train(3)]
    with MetricsLog(folder) as log:
        for record in records:
            log.write(record)
    path = folder / METRICS_FILE
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    # A line is also complete without its newline, because its closing brace is there.
    kept = [
        r
        for r, end in zip(records, np.cumsum([len(x) + 1 for x in whole.split(b"\n")]), strict=False)
        if end <= cut + 1
    ]
    assert read_metrics(folder) == kept
    resumed_at = data.draw(st.integers(0, 4))
    with MetricsLog(folder, resumed_at=resumed_at) as log:
        stay = [r for r in kept if r["step"] <= resumed_at]
        assert read_metrics(folder) == stay
        log.write(train(resumed_at + 1))
    assert read_metrics(folder) == [*stay, train(resumed_at + 1)]
    assert [p.name for p in folder.iterdir()] == [METRICS_FILE]


WRITER = """
import sys, time
from accessory.train.metrics import MetricsLog
folder, resumed_at = sys.argv[1], int(sys.argv[2])
with MetricsLog(folder, resumed_at=resumed_at) as log:
    step = resumed_at
    while True:
        step += 1
        log.write({"kind": "train", "step": step, "loss": 1 / step, "layers": {"share": [[step / 7] * 8] * 400}})
        time.sleep(0.002)  # a busy machine's reader must keep up
"""


def test_a_writer_that_is_killed_leaves_one_curve(tmp_path):
    (tmp_path / METRICS_FILE).touch()
    last = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(last)])
        try:
            deadline = time.monotonic() + 30
            while (tmp_path / METRICS_FILE).stat().st_size < 200_000 or len(steps(tmp_path)) < last + 5:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        seen = steps(tmp_path)
        assert seen == list(range(1, len(seen) + 1))
        last = len(seen) - 3  # the last checkpoint is older than the last line


def test_a_new_run_begins_an_empty_file(tmp_path):
    for step in (1, 7):
        with MetricsLog(tmp_path) as log:
            assert steps(tmp_path) == []
            log.write(train(step))
    assert steps(tmp_path) == [7]


def test_bad_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl: missing; give the output folder"):
        read_metrics(tmp_path)
    path = tmp_path / METRICS_FILE
    for broken in (b'{"kind": "train", "st', b"[1]", b"\xff\x00", b'{"kind": "train"}'):
        path.write_bytes(b'{"kind":"train","step":1}\n' + broken + b'\n{"kind":"train","step":2}\n')
        with pytest.raises(InputError, match=r"metrics\.jsonl:2: not a record"):
            read_metrics(tmp_path)
        before = path.read_bytes()
        with pytest.raises(InputError, match=r"metrics\.jsonl:2: not a record"):
            MetricsLog(tmp_path, resumed_at=2)
        assert path.read_bytes() == before
    assert next(iterate_metrics(tmp_path))["step"] == 1  # one at a time: the first is read before the second


def test_an_unknown_plugin_touches_nothing(tmp_path):
    with pytest.raises(ConfigError, match="loggers: got 'visdom', but it must be one of tensorboard, wandb, trackio"):
        MetricsLog(tmp_path / "run", ["visdom"])
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------- progress


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("accessory.train.progress.time.monotonic", lambda: self.now)


def test_plain_lines_every_ten_seconds_and_the_last(monkeypatch):
    clock, out = Clock(monkeypatch), io.StringIO()
    with Progress(1000, stream=out) as progress:
        for step in range(1, 26):
            clock.now += 1.0
            progress.update(train(step))
            if step == 15:
                progress.update({"kind": "eval", "step": 15, "loss": 1.23456, "tokens": 5})
    lines = out.getvalue().splitlines()
    assert [re.match(r"step (\d+)", line)[1] for line in lines] == ["1", "11", "15", "21", "25"]
    assert lines[2] == "step 15: held-out loss 1.2346"
    assert lines[0] == (
        "step 1/1000  8:20 left  loss 3.0000  balance 1.020  lr 5.00e-06  12.3k tokens/s  23.4 GB  grad norm 1.5"
    )
    assert "step 25/1000  16:15 left" in lines[-1]  # 975 steps of one second


def test_time_left_of_a_resumed_run_counts_its_own_steps(monkeypatch):
    clock, out = Clock(monkeypatch), io.StringIO()
    with Progress(200, 100, every=0, stream=out) as progress:
        for step in range(101, 111):
            clock.now += 2.0
            progress.update(train(step))
    assert "step 110/200  3:00 left" in out.getvalue()


def test_it_bears_short_and_odd_records():
    out = io.StringIO()
    with Progress(2, every=0, stream=out) as progress:
        progress.update({"kind": "train", "step": 1, "loss": math.nan})
        progress.update(train(2, tokens_per_s=math.inf, grad_norm=math.nan))
        progress.note("a note")
    assert "step 1/2  0:00 left  loss nan\n" in out.getvalue()
    assert out.getvalue().endswith("a note\n")
    with Progress(2, enabled=False, stream=out) as progress:
        progress.update(train(1))
        progress.note("unseen")
    assert "unseen" not in out.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal():
    out = Terminal()
    with Progress(4, done=1, stream=out) as progress:
        for step in (2, 3, 4):
            progress.update(train(step))
        progress.note("the router has collapsed")
    text = out.getvalue()
    assert "100%" in text
    assert "\r" in text
    assert re.search(r"step 4/4  0:00 left  loss 2\.2500  balance 1\.020", text)
    assert "the router has collapsed\n" in text


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (63, "step 800/1000  {} left  loss 3.0000  12.3k tokens/s"),
        (80, "step 800/1000  {} left  loss 3.0000  12.3k tokens/s  23.4 GB"),
        (85, "step 800/1000  {} left  loss 3.0000  lr 5.00e-06  12.3k tokens/s  23.4 GB"),
        (111, "step 800/1000  {} left  loss 3.0000  balance 1.020  lr 5.00e-06  12.3k tokens/s  23.4 GB"),
        (
            140,
            "step 800/1000  {} left  loss 3.0000  balance 1.020  lr 5.00e-06  12.3k tokens/s  23.4 GB  grad norm 1.5",
        ),
    ],
)
def test_a_narrow_terminal_loses_what_matters_least(columns, text):
    seen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(terminal, "w") as stream, Progress(1000, done=799, stream=stream) as progress:
        progress.update(train(800, step_s=21.0, loss=3.0))
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal that nobody writes to any more
        while piece := os.read(seen, 10_000):
            said += piece
    os.close(seen)
    drawn = [line for line in said.decode().split("\r") if line.strip()][-1].rstrip()
    assert drawn.endswith(f"{'  ' if columns < 100 else '| '}{text.format('1:10:00')}")
    assert len(drawn) < columns


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (65.4, "1:05"),
        (3599.9, "1:00:00"),
        (3661, "1:01:01"),
        (183600, "2 d 3 h"),
        (math.nan, "?"),
        (-1, "?"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_counts():
    values = [0, 7, 950, 999.9, 12345.6, 4.56e6, 7.891e9]
    assert [short(x) for x in values] == ["0", "7", "950", "1k", "12.3k", "4.56M", "7.89B"]


# --------------------------------------------------------------------------- the router


def routed(step, *share):
    return {"kind": "train", "step": step, "layers": {"share": list(share)}}


FAIR = [0.125] * 8
COLLAPSED = [0.01, 0.47, *[0.52 / 6] * 6]  # 94 % of the tokens visit expert 1
STARVED = [0.1427] * 7 + [0.0011]


def test_a_balanced_router_is_not_warned_about():
    watch = RouterWatch(top_k=2)
    assert [watch.check(routed(step, FAIR, FAIR)) for step in range(300)] == [[]] * 300


def test_a_collapse_is_told_once_and_names_its_place():
    watch = RouterWatch(top_k=2)
    said = {step: new for step in range(1, 300) if (new := watch.check(routed(step, FAIR, COLLAPSED)))}
    assert list(said) == [20]
    assert said[20] == [
        "step 20: the router has sent over 90% of the tokens to one expert for 20 steps: layer 1 expert 1. "
        "Raise load_balancing_weight or lower lr."
    ]


def test_an_idle_expert_is_told_once_and_one_token_resets_the_count():
    watch = RouterWatch(top_k=2)
    for step in range(1, 100):
        assert watch.check(routed(step, STARVED)) == []
    assert watch.check(routed(100, FAIR)) == []
    said = {step: new for step in range(101, 500) if (new := watch.check(routed(step, STARVED)))}
    assert list(said) == [200]
    assert "hardly sent a token to an expert for 100 steps: layer 0 expert 7." in said[200][0]


def test_many_places_make_one_line():
    watch = RouterWatch(top_k=1)
    alone = [1.0, 0.0, 0.0, 0.0]
    said = [line for step in range(1, 101) for line in watch.check(routed(step, *[alone] * 32))]
    assert len(said) == 2
    assert "layer 0 expert 0, layer 1 expert 0, layer 2 expert 0, layer 3 expert 0 and 28 more." in said[0]
    assert "and 92 more." in said[1]


def test_where_a_token_visits_all_experts_none_is_crowded():
    watch = RouterWatch(top_k=2)
    assert [line for step in range(100) for line in watch.check(routed(step, [0.5, 0.5]))] == []
