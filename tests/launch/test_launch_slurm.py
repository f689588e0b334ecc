"""The pages' srun lines in a real Slurm of two nodes: generation, a demo, the four finetuning scripts, and scancel."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
from helpers import slurm
from helpers.random_models import write_speaking
from helpers.sizes import SPEAKING

import accessory
from accessory.checkpoint.folder import open_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing())),
]
PACKAGE = Path(accessory.__file__).parent
EXPS = PACKAGE / "exps" / "finetune" / "sg"
ACCESSORY = (sys.executable, "-m", "accessory")
TWO_NODES = ("-n2", "--gres=gpu:8", "--ntasks-per-node=1")
TURNS = [{"from": "human", "value": "What is one and one?"}, {"from": "gpt", "value": "Two."}]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model of a few thousand parameters, and what it learns."""
    folder = tmp_path_factory.mktemp("made")
    write_speaking(folder / "model", SPEAKING.replace(n_layers=1))
    (folder / "data.json").write_text(json.dumps([{"conversations": TURNS}] * 32))
    (folder / "data.yaml").write_text(f"META:\n  - path: {folder}/data.json\n    type: text\n")
    return folder


def generate(made):
    return (
        *ACCESSORY, "generate", made / "model", "--prompt", "One and one", "--max-gen-len", "12", "--device", "cpu",
        "--dtype", "fp32",
    )  # fmt: skip


def finetune(made, script, *more):
    model = made / "model"
    return (
        "bash", EXPS / f"dialog_ultrachat200kWizardcode_{script}.sh", model, model / "config.json",
        model / "tokenizer.model", "--data_config", made / "data.yaml", "--precision", "fp32", "--max_words", "64",
        "--batch_size", "1", "--device", "cpu", *more,
    )  # fmt: skip


def no_process_of(words):
    """Whether every process that has these words in its command has ended, within 20 seconds."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        commands = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
        if not any(words in command for command in commands):
            return True
        time.sleep(0.2)
    return False


def lines_of(process):
    """A process's lines as they come, in a queue."""
    found: queue.Queue[str] = queue.Queue()

    def read():
        for line in process.stdout:
            found.put(line)

    threading.Thread(target=read, daemon=True).start()
    return found


def test_generation_is_that_of_one_process(cluster, made):
    command = list(map(str, generate(made)))
    alone = subprocess.run(command, capture_output=True, text=True, check=True, env=cluster.environment, timeout=100)
    done = cluster.srun("-n4", "--gres=gpu:8", "--ntasks-per-node=2", *generate(made), cwd=made)
    assert (done.returncode, done.stdout) == (0, alone.stdout), done.stderr
    assert len(alone.stdout.split()) > 3


def test_a_wrong_option_is_one_line(cluster, made):
    done = cluster.srun(*TWO_NODES, *generate(made), "--temperature", "-1", cwd=made)
    assert done.returncode
    assert done.stderr.count("temperature") == 1, done.stderr


def test_a_demo_is_served_by_the_first_rank(cluster, made):
    pytest.importorskip("gradio", reason="needs gradio: pip install gradio")
    demo = ("demos/single_turn.py", "--pretrained_path", made / "model", "--port", "0")
    process = cluster.start(*TWO_NODES, sys.executable, "-u", *demo, cwd=PACKAGE)
    lines, said = lines_of(process), ""
    while "Open " not in said:
        said += lines.get(timeout=90)
    address = said.partition("Open ")[2].split()[0]
    with urllib.request.urlopen(address, timeout=20) as page:
        assert b"gradio" in page.read()
    cluster.cancel()
    process.wait(60)
    assert no_process_of("demos/single_turn.py")


@pytest.mark.parametrize(
    ("script", "ranks"), [("mixtral", "1"), ("mixtralSparse", "2"), ("mixtralPeft", "2"), ("mixtralSparsePeft", "1")]
)
def test_a_script_trains_on_two_nodes(cluster, made, script, ranks, tmp_path):
    """ranks: those that share the network; on one of them data parallelism spans the nodes."""
    more = ("--model_parallel_size", ranks, "--accum_iter", "4")
    done = cluster.srun(
        *TWO_NODES, *finetune(made, script, *more), cwd=PACKAGE, PYTHON=sys.executable, OUTPUT_DIR=str(tmp_path / "run")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("exp name:") == 1
    assert (tmp_path / "run" / "report.html").is_file()
    assert list((tmp_path / "run" / "final").glob(f"consolidated.*-of-0{ranks}.model*.pth"))


def test_what_scancel_ends_goes_on(cluster, made, tmp_path):
    """The same line resumes, and ends with the weights of a run that nobody ended."""
    more = ("--model_parallel_size", "1", "--accum_iter", "1", "--epochs", "6", "--warmup_epochs", "0")
    line = (*TWO_NODES, *finetune(made, "mixtralSparse", *more))
    variables = {"PYTHON": sys.executable}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = cluster.srun(*line, cwd=PACKAGE, OUTPUT_DIR=str(whole), **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    process = cluster.start(*line, cwd=PACKAGE, OUTPUT_DIR=str(broken), **variables)
    lines_of(process)
    metrics, until = broken / "metrics.jsonl", time.monotonic() + 90
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 5):
        assert time.monotonic() < until
        time.sleep(0.02)
    cluster.cancel()
    process.wait(60)
    assert no_process_of("main_finetune.py")
    assert not (broken / "final").exists()
    ended = len(metrics.read_text().splitlines())
    again = cluster.srun(*line, cwd=PACKAGE, OUTPUT_DIR=str(broken), **variables)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "step 1/" not in again.stdout
    steps = [[json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, broken)]
    assert len(steps[0]) == len(steps[1]) > ended
    ours, theirs = (open_checkpoint(run / "final").tensors for run in (broken, whole))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].load(), theirs[name].load(), rtol=0, atol=0)
