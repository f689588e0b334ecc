"""What the tests of `accessory generate --lines` share: a model, a file of prompts, and a call of the command."""

from __future__ import annotations

import pytest
from helpers.command_line import write_hf
from helpers.lines import HOW, ONE_ERROR, WORDS

from accessory.cli import main
from accessory.model.meta import MetaModel
from accessory.model.requests import RequestMaker


@pytest.fixture(scope="session")
def lines_folder(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("lines") / "hf")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path


@pytest.fixture
def answer(lines_folder, here, capsys):
    """Run `accessory generate --lines` in this process; returns its status, what it printed, and its one error."""

    def run(*options: str, file: str = "in.txt", out: str | None = "out.jsonl") -> tuple[int, str, str]:
        words = ["--prompt-file", file, "--lines", *(["--out", out] if out else [])]
        status = main(["generate", str(lines_folder), *HOW, *words, *options])
        printed, err = capsys.readouterr()
        err = "".join(line for line in err.splitlines(keepends=True) if line.startswith("accessory: "))
        assert err == "" or ONE_ERROR.fullmatch(err)
        return status, printed, err

    return run


@pytest.fixture
def loaded(monkeypatch):
    """Which models were loaded, and how many requests were made, while the test ran."""
    seen = {"models": 0, "requests": 0}
    load, make = MetaModel.from_pretrained.__func__, RequestMaker.make

    def counted_load(cls, *args, **how):
        seen["models"] += 1
        return load(cls, *args, **how)

    def counted_make(self, *args):
        seen["requests"] += 1
        return make(self, *args)

    monkeypatch.setattr(MetaModel, "from_pretrained", classmethod(counted_load))
    monkeypatch.setattr(RequestMaker, "make", counted_make)
    return seen
