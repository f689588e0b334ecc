"""The programs in examples/ run on a tiny folder and show what the model writes."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.random_models import write_speaking
from helpers.sizes import SPEAKING

from accessory.config import MoEArgs
from accessory.convert.convert import convert
from accessory.model.meta import MetaModel

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGS = SPEAKING.replace(n_layers=1, max_seq_len=256, moe=MoEArgs())


PROMPT = "The capital of France is"
SOME_RANKS = (("base", 2), ("base", 8), ("sparse", 1), ("sparse", 2), ("sparse", 4))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("examples")
    write_speaking(root / "hf", ARGS)
    for kind in ("base", "sparse"):
        convert(root / "hf", root / kind, to=kind, shards=2, progress=False)
    return root


@pytest.fixture(scope="module")
def expected(folders):
    model = MetaModel.from_pretrained(folders / "hf", dtype=torch.float32, max_seq_len=64, device="cpu")
    return model.generate([PROMPT], max_gen_len=6)[0]


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("base", 1),
        *(pytest.param(kind, n, marks=pytest.mark.slow) for kind, n in SOME_RANKS),
        *(pytest.param(kind, n, marks=pytest.mark.long) for kind, n in (("base", 4), ("sparse", 8))),
    ],
)
def test_simple_inference_on_any_number_of_ranks(folders, expected, kind, ranks):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / "simple_inference.py"), str(folders / kind), "--prompt", PROMPT]
    command += ["--max_gen_len", "6", "--dtype", "float32", "--ranks", str(ranks), "--port", str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    whole, *growing = done.stdout.rstrip("\n").split("\n")
    assert whole == growing[-1] == expected
    assert all(b.startswith(a) for a, b in itertools.pairwise(growing))


def test_every_example_is_listed_in_its_readme():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = [path.name for path in EXAMPLES.glob("*.py") if path.name != "__init__.py"]
    folders = [path.parent.name for path in EXAMPLES.glob("*/__main__.py")]
    assert {"simple_inference.py", "emoji"} <= {*scripts, *folders}
    assert all(f"({name})" in page for name in [*scripts, *folders])
