"""The command `accessory` in tests: input folders, typed lines, and runs in a separate process."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from accessory.cli import main
from helpers.random_models import write_speaking
from helpers.sizes import SPEAKING


def write_hf(folder: Path) -> Path:
    """A Hugging Face folder of a tiny random Mixtral with the real tokenizer."""
    write_speaking(folder, SPEAKING.replace(max_seq_len=256))
    return folder


def convert_to_base(folder: Path) -> Path:
    """Converts the model to folder `base` next to it, in two shards."""
    path = folder.with_name("base")
    assert main(["convert", str(folder), str(path), "--to", "base", "--shards", "2"]) == 0
    return path


def standard_input(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def program(*words: str, input: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accessory", *words]
    return subprocess.run(command, input=input, capture_output=True, text=True, timeout=timeout, check=False)
