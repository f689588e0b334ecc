"""`write_report`: it shows the numbers of any run, and escapes texts."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from helpers import runs
from helpers.reports import hide_bokeh, records, shown, written

from accessory.cli import main
from accessory.errors import InputError, MissingExtraError
from accessory.train.metrics import METRICS_FILE
from accessory.train.report.write import write_report


def test_the_summary_is_the_runs(tmp_path):
    items = list(records(120, 2, 4, evals=3))
    page = shown(write_report(written(tmp_path / "my-run", items)))
    losses = [r["loss"] for r in items if r["kind"] == "train"]
    held = [r["loss"] for r in items if r["kind"] == "eval"]
    best = int(np.argmin(losses))
    for text in (
        "<h1>Finetuning my-run</h1>",
        "Steps 1 to 120 · 2 layers of 4 experts",
        f"{losses[0]:.3f} → {losses[-1]:.3f}",
        f"lowest {losses[best]:.4f} at step {best + 1}",
        f"{held[0]:.3f} → {held[-1]:.3f}",
        "960 samples",
        "1:00",  # 120 steps of half a second
        "120k",
        "2k tokens/s",
        "23.4 GB",
        "[&quot;base&quot;, &quot;adapter&quot;]",
    ):
        assert text in page, text
    last = np.mean([r["layers"]["share"] for r in items if r["kind"] == "train"][-50:], axis=0)
    cells = re.findall(r"<td style=[^>]*>([\d.]+)%</td>", page)
    np.testing.assert_allclose(np.array(cells, float).reshape(2, 4) / 100, last, atol=5.1e-4)


def test_an_idle_expert_is_named(tmp_path):
    items = list(records(60, 3, 4))
    for record in items:
        record["layers"]["share"][1] = [0.5, 0.499, 0.0, 0.001]
    page = shown(write_report(written(tmp_path, items)))
    assert "expert 2 of layer 1, 3 of layer 1." in page


def test_text_is_escaped_and_given_words_win(tmp_path):
    folder = written(tmp_path / "<i>run", records(2, 1, 2))
    page = write_report(folder)
    text = page.read_text()
    assert "<script>alert" not in text
    assert "<i>" not in shown(page)
    page = write_report(folder, 'A <b> & a "quote"', {"only": "<this>"})
    assert text.count("<script") == page.read_text().count("<script")  # the first configuration holds one
    assert "<title>A &lt;b&gt; &amp; a &quot;quote&quot;</title>" in shown(page)
    assert "&lt;this&gt;" in shown(page)
    assert "mixtral_sparse" not in shown(page)
    assert not list(folder.glob("*.partial"))


def test_a_run_without_steps_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match=r"metrics\.jsonl: missing"):
        write_report(tmp_path)
    written(tmp_path, [])
    with pytest.raises(InputError, match="has no training step yet"):
        write_report(tmp_path)
    written(tmp_path, records(1, 1, 2))
    (tmp_path / "config.yaml").write_text("lr: [1")
    with pytest.raises(InputError, match=r"config\.yaml: is not YAML \(.*\); mend or remove it"):
        write_report(tmp_path)
    written(tmp_path, [])
    assert main(["report", str(tmp_path)]) == 1
    assert re.fullmatch(r"accessory: error: [^\n]+ no training step yet[^\n]+\n", capsys.readouterr().err)


def test_the_command_reports_a_run_that_was_killed(tmp_path, capsys):
    written(tmp_path, records(5, 2, 4))
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'{"kind":"train","step":6,"los')
    assert main(["report", str(tmp_path), "--title", "Cut short"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    page = shown(tmp_path / "report.html")
    assert "Steps 1 to 5" in page
    assert "mixtral_sparse" in page


@pytest.mark.long
def test_a_hundred_thousand_steps_of_a_large_model(tmp_path):
    (record,) = records(1, 32, 8)
    layers = json.dumps({"layers": record.pop("layers")})[1:]  # the same in every step, and nearly all of the text
    with (tmp_path / METRICS_FILE).open("w") as file:
        for step in range(1, 100_001):
            record.update(step=step, loss=2 + math.sin(step) / (1 + step / 1000), grad_norm=1 + math.cos(step * step))
            file.write(f"{json.dumps(record)[:-1]}, {layers}\n")
    assert write_report(tmp_path).stat().st_size < 3e6


def test_without_bokeh_the_command_says_so_before_anything_else(tmp_path, monkeypatch, capsys):
    hide_bokeh(monkeypatch)
    with pytest.raises(MissingExtraError, match=r"pip install 'mixtral-accessory\[report\]'"):
        write_report(tmp_path / "no such folder")
    assert main(["report", str(tmp_path)]) == 1
    assert re.fullmatch(
        r"accessory: error: \S+report\.html: its charts need Bokeh: pip install [^\n]+\n", capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_without_bokeh_a_run_says_so_and_finishes(inputs, tmp_path, monkeypatch, capsys):
    hide_bokeh(monkeypatch)
    final = runs.finetune(inputs, tmp_path / "run", max_steps=2)
    assert (final / "config.json").is_file()
    assert len(runs.records(tmp_path / "run")) == 2
    assert not (tmp_path / "run" / "report.html").exists()
    told = [line for line in capsys.readouterr().out.splitlines() if "report.html" in line]
    assert told == [
        f"{tmp_path / 'run' / 'report.html'}: its charts need Bokeh: pip install 'mixtral-accessory[report]', "
        f"then accessory report {tmp_path / 'run'}"
    ]
