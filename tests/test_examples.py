"""The programs in examples/ run on a tiny folder and show what the model writes."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.random_models import hf_mixtral

from accessory.checkpoint.convert import convert
from accessory.config import ModelArgs, MoEArgs
from accessory.data.tokenizer import MIXTRAL_TOKENIZER
from accessory.model.meta import MetaModel

EXAMPLES = Path(__file__).parents[1] / "examples"
ARGS = ModelArgs(
    dim=32,
    hidden_dim=32,
    n_layers=1,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=32000,
    max_seq_len=256,
    moe=MoEArgs(num_experts=4),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples")
    hf_mixtral(ARGS, std=0.2).save_pretrained(path / "hf")
    shutil.copy(MIXTRAL_TOKENIZER, path / "hf" / "tokenizer.model")
    convert(path / "hf", path / "converted", to="base", shards=2, progress=False)
    return path / "converted"


def test_simple_inference(folder, monkeypatch, capsys):
    prompt = "The capital of France is"
    words = ["simple_inference.py", str(folder), "--prompt", prompt, "--max_gen_len", "6", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(EXAMPLES / "simple_inference.py"), run_name="__main__")
    answer = MetaModel.from_pretrained(folder, dtype=torch.float32, max_seq_len=64).generate([prompt], max_gen_len=6)[0]
    assert capsys.readouterr().out == f"{prompt}{answer}\n\nAgain, token by token:\n{prompt}{answer}\n"


def test_every_example_is_listed_in_its_readme():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in page for path in EXAMPLES.glob("*.py"))
