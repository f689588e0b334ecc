"""The logger plug-ins store what was written. Each is tested with its real package, if that is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accessory.errors import MissingExtraError
from accessory.train import loggers
from accessory.train.metrics import MetricsLog

LAYERS = {
    "balance": [1.01, 1.03],
    "entropy": [1.3, 1.2],
    "largest": [0.3, 0.4],
    "share": [[0.3, 0.2, 0.25, 0.25], [0.4, 0.2, 0.2, 0.2]],
}
CONFIG = {"lr": 2e-5, "llama_config": ["a.json", "b.json"], "template": None}


def needs(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"needs {name}: pip install {name}")


def train(step: int, loss: float) -> dict[str, object]:
    return {"kind": "train", "step": step, "loss": loss, "z": 3.0, "lr": 1e-5, "tokens_per_s": 9.0, "layers": LAYERS}


def interrupted_run(folder: Path, name: str) -> None:
    """Write steps 1 to 5, then resume after step 3 and write steps 4 to 7 with other losses."""
    with MetricsLog(folder, [name], config=CONFIG) as log:
        log.write({"kind": "eval", "step": 0, "loss": 8.5, "tokens": 30})
        for step in range(1, 6):
            log.write(train(step, 10.0 + step))
        log.write({"kind": "eval", "step": 5, "loss": 7.5, "tokens": 30})
    time.sleep(1.1 if name == "wandb" else 0)  # its folders are named by the second
    with MetricsLog(folder, [name, name], resumed_at=3, config=CONFIG) as log:
        for step in range(4, 8):
            log.write(train(step, 20.0 + step))


LOSSES = {1: 11.0, 2: 12.0, 3: 13.0, 4: 24.0, 5: 25.0, 6: 26.0, 7: 27.0}


def test_names_are_grouped():
    record = {**train(1, 2.5), "balance": 1.02, "grad_norm": math.nan, "note": "text", "flag": True}
    named = loggers.scalars(record)
    assert math.isnan(named.pop("train/grad_norm"))
    assert named == {
        "train/loss": 2.5,
        "train/lr": 1e-5,
        "router/balance": 1.02,
        "router/z": 3.0,
        "speed/tokens_per_s": 9.0,
        "router/layer_00/balance": 1.01,
        "router/layer_01/balance": 1.03,
        "router/layer_00/entropy": 1.3,
        "router/layer_01/entropy": 1.2,
        "router/layer_00/largest": 0.3,
        "router/layer_01/largest": 0.4,
    }
    assert loggers.scalars({"kind": "eval", "step": 3, "loss": 1.5, "tokens": 7}) == {
        "eval/loss": 1.5,
        "eval/tokens": 7.0,
    }


@pytest.mark.parametrize("name", list(loggers.LOGGERS))
def test_a_missing_package_is_named_before_anything_is_touched(tmp_path, name):
    """Runs in a process without the packages. A folder with the package's name in the current folder does not count."""
    (tmp_path / name).mkdir()
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        f"sys.path += ['', {str(Path(loggers.__file__).parents[2])!r}]\n"
        "from accessory.train.loggers import require_loggers\n"
        "from accessory.errors import MissingExtraError\n"
        f"try: require_loggers([{name!r}])\n"
        "except MissingExtraError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    pip = f"pip install 'mixtral-accessory[log]' or pip install {name}"
    assert done.stdout == f"loggers: {name} needs the package {name}: {pip}\n"


def test_a_run_does_not_begin_without_its_plugins(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install trackio"):
        MetricsLog(tmp_path / "run", ["trackio"])
    assert not (tmp_path / "run").exists()


@needs("tensorboard")
def test_tensorboard_shows_one_curve(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted_run(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("train/loss")} == LOSSES
    assert len(events.Scalars("train/loss")) == len(LOSSES)
    assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == [(0, 8.5)]
    (value,) = {event.value for event in events.Scalars("router/layer_01/largest")}
    assert value == pytest.approx(0.4)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "llama_config: ['a.json', 'b.json']" in text
    # A new run in the same folder removes all records of the old one.
    with MetricsLog(tmp_path, ["tensorboard"]) as log:
        log.write(train(1, 1.5))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.5)]
    assert "eval/loss" not in events.Tags()["scalars"] or events.Scalars("eval/loss") == []


def wandb_records(path: Path) -> list:
    """An offline run: protobuf records in LevelDB's log format, blocks of 32 KiB with chunks of crc, length, kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, records, whole = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind not in (1, 2, 3, 4):
            break
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last part
            records.append(Record.FromString(whole))
            whole = b""
    return records


@needs("wandb")
def test_wandb_keeps_both_parts_under_one_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    interrupted_run(tmp_path / "run", "wandb")
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(files) == 2
    assert len({path.name for path in files}) == 1
    curve = {}
    for path in files:
        records = wandb_records(path)
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert run.project == "mixtral-accessory"
        assert run.display_name == "run"
        assert {item.key: item.value_json for item in run.config.update}["template"] == "null"
        for record in records:
            row = {
                item.key or "/".join(item.nested_key): float(item.value_json)
                for item in record.history.item
                if not (item.key or item.nested_key[0]).startswith("_")
            }
            if "train/loss" in row:
                curve[row["step"]] = row["train/loss"]
                assert row["router/layer_01/largest"] == 0.4
    assert curve == LOSSES


def apart(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run in a new process, because these packages read the environment only once, at first use."""
    begin = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(loggers.__file__).parents[2])!r}]\n"
    imports = "from pathlib import Path\nfrom test_train_loggers import *\n"
    command = [sys.executable, "-c", begin + imports + code]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=90)


@needs("wandb")
def test_wandb_without_an_account_is_a_plain_error(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody there
    monkeypatch.setenv("HOME", str(tmp_path))
    done = apart(
        "try: MetricsLog('run', ['wandb'])\nexcept loggers.ConfigError as error: print('got', error)", tmp_path
    )
    said = re.search(r"^got (.+)$", done.stdout, re.MULTILINE)[1]
    assert re.fullmatch(
        r"loggers: wandb did not start \(.+\); log in with `wandb login`, or set WANDB_MODE=offline", said
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@needs("trackio")
def test_trackio_continues_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    apart("interrupted_run(Path('run'), 'trackio')", tmp_path)
    (database,) = (tmp_path / "kept").glob("mixtral-accessory*.db")
    with contextlib.closing(sqlite3.connect(database)) as opened:
        rows = opened.execute(
            "select run_id, run_name, step, json_extract(metrics, '$.\"train/loss\"'), "
            "json_extract(metrics, '$.\"router/layer_01/largest\"') from metrics order by id"
        ).fetchall()
    assert len({row[:2] for row in rows}) == 1
    assert rows[0][1] == "run"
    assert {step: loss for _, _, step, loss, _ in rows if loss is not None} == LOSSES
    assert {largest for *_, loss, largest in rows if loss is not None} == {0.4}
