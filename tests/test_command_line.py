"""Misspelt options, commands and values: one line, of the right command, with what was meant."""

from __future__ import annotations

import pytest

from accessory.cli import main
from accessory.demos import serving


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("generate x --promt y", "accessory generate: error: --promt is no option of generate; did you mean --prompt?"),
        ("generate x --promt=y", "accessory generate: error: --promt is no option of generate; did you mean --prompt?"),
        (
            "finetune r --dryrun",
            "accessory finetune: error: --dryrun is no option of finetune; did you mean --dry-run?",
        ),
        ("finetune --dryrun", "accessory finetune: error: --dryrun is no option of finetune; did you mean --dry-run?"),
        ("convert a b --ot hf", "accessory convert: error: --ot is no option of convert; did you mean --to?"),
        ("info a -x", "accessory info: error: -x is no option of info; see accessory info --help"),
        ("info a b", "accessory info: error: b is one word too many for info; see accessory info --help"),
        ("genrate x", "accessory: error: genrate is no command of accessory; did you mean generate?"),
        ("data chek x", "accessory data: error: chek is no command of accessory data; did you mean check?"),
        ("generate x --dtype bf61", "accessory generate: error: argument --dtype: got 'bf61'; did you mean bf16?"),
        ("--debg info x", "accessory: error: --debg is no option of accessory; see accessory --help"),
    ],
)
def test_what_is_misspelt_gets_a_suggestion(line, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert (ended.value.code, capsys.readouterr().err) == (2, said + "\n")


def test_a_demo_suggests_too(capsys):
    with pytest.raises(SystemExit):
        serving.parser("single_turn.py", "").parse_args(["--pretraned_path", "x"])
    said = "single_turn.py: error: --pretraned_path is no option of single_turn.py; did you mean --pretrained-path?\n"
    assert capsys.readouterr().err == said


def test_values_and_beginnings_of_options_are_taken(monkeypatch):
    given = []
    monkeypatch.setattr("accessory.cli._generate", lambda options: given.append(options) or 0)
    assert main(["generate", ".", "--prompt", "--no option = that", "--max-gen", "3"]) == 0
    assert (given[0].prompt, given[0].max_gen_len) == (["--no option = that"], 3)
    monkeypatch.setattr("accessory.cli._finetune", lambda options: given.append(options) or 0)
    assert main(["finetune", "r", "a=1", "--dry-run", "b=2"]) == 0
    assert given[1].overrides == ["a=1", "b=2"]
