"""`accessory data check` of a data file, without a YAML that lists it."""

import json
from pathlib import Path

import pytest

from accessory.cli import main
from accessory.data.tokenizer import MIXTRAL_TOKENIZER

SINGLE = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


@pytest.mark.parametrize("name", ["my.jsonl", "my.json", "my.csv", "my.parquet"])
def test_a_data_file_needs_no_list(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    if name.endswith(".parquet"):
        parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.Table.from_pylist([SINGLE] * 3), name)
    else:
        keys, values = ",".join(SINGLE), ",".join(SINGLE.values())
        lines = "\n".join([json.dumps(SINGLE)] * 3)
        Path(name).write_text(f"{keys}\n" + f"{values}\n" * 3 if name.endswith(".csv") else lines)
    Path("my.yaml").write_text(f"META:\n- path: {name}\n")
    words = ["--model", str(MIXTRAL_TOKENIZER), "--json"]
    found = []
    for config in (name, "my.yaml"):
        assert main(["data", "check", config, *words]) == 0
        found.append(json.loads(capsys.readouterr().out)["data_config"])
        assert found[-1].pop("path") == config
    assert found[0] == found[1]
    assert found[0]["counts"][0]["items"] == 3


def test_a_file_of_another_kind_is_one_line(tmp_path, capsys):
    (tmp_path / "my.txt").write_text("Once upon a time.\n")
    assert main(["data", "check", str(tmp_path / "my.txt"), "--model", str(MIXTRAL_TOKENIZER)]) == 1
    said = capsys.readouterr().err
    assert said.endswith("nor a data file, which ends in .json, .jsonl, .csv, .parquet\n")
    assert said.count("\n") == 1
