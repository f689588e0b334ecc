"""`accessory demo --serve`: the mistakes it explains, and (slow) the real demo."""

from __future__ import annotations

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
