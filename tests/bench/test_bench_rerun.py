"""The commands above the tables of benchmarks/README.md: they are found, they exist, and they are run one by one."""

import re
import subprocess
import sys
import tarfile

import pytest

from benchmarks import rerun

PAGE = """# Figures

## One

Words.

    accessory bench 8x7b --what decode [--batch 4 | --batch 16]

| a | b |

### Within

    python -c "print('two')"
    python -c "raise SystemExit(3)"
    python -c "import time; print('begun', flush=True); time.sleep(60)"
"""


def test_commands_stand_under_headings_with_their_alternatives():
    assert [c for c in rerun.commands_of(PAGE) if c.section == "One"] == [
        ("One", f"accessory bench 8x7b --what decode{more}") for more in ("", " --batch 4", " --batch 16")
    ]


def test_a_section_is_named_by_its_beginning():
    commands = rerun.commands_of(PAGE)
    assert [c.section for c in rerun.chosen(commands, ["with", "One"])] == ["Within"] * 3 + ["One"] * 3
    with pytest.raises(SystemExit, match="begins with 'Three'; --list"):
        rerun.chosen(commands, ["Three"])


def test_every_program_exists_or_its_replacement_is_named():
    page = rerun.README.read_text()
    for command in rerun.commands_of(page):
        for name in re.findall(r"benchmarks/(\w+\.py)", command.words):
            assert (rerun.README.parent / name).exists() or f"`{name}`" in page, command


def test_outputs_stay_where_a_command_fails_or_is_cut_off(tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text(PAGE)
    monkeypatch.setattr(rerun, "README", tmp_path / "README.md")
    out, archive = tmp_path / "out", tmp_path / "out.tgz"
    words = ["rerun", "Within", "--out", str(out), "--each", "1.5", "--archive", str(archive)]
    monkeypatch.setattr(sys, "argv", words)
    assert rerun.main() == 1
    told = capsys.readouterr().out.splitlines()
    assert [re.sub(r"after \d+ s", "after", line).split(": ")[:2] for line in told] == [
        ["1 of 3", "done"], ["2 of 3", "exit status 3 after"], ["3 of 3", "cut off after"],
    ]  # fmt: skip
    assert (out / "01.log").read_text().splitlines()[-1] == "two"
    assert (out / "03.log").read_text().splitlines()[-1] == "begun"
    with tarfile.open(archive) as packed:
        assert sorted(packed.getnames()) == ["out", "out/01.log", "out/02.log", "out/03.log"]
    monkeypatch.setattr(sys, "argv", [*words, "--minutes", "0"])
    assert rerun.main() == 1
    assert "not begun" in capsys.readouterr().out


def test_it_lists_what_there_is():
    told = subprocess.run([sys.executable, rerun.__file__, "--list"], capture_output=True, text=True, check=True).stdout
    assert "A training step: accessory bench 8x7b --what train --layers 2" in told
