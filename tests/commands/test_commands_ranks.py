"""`accessory generate` on two ranks, started in any way: prints the text of one process once."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from helpers.distributed import run_ranks
from helpers.random_models import write_speaking
from helpers.sizes import SPEAKING

from accessory.cli import main
from accessory.model.meta import MetaModel

ARGS = SPEAKING.replace(n_layers=1, max_seq_len=256)
PROMPT = "The capital of France is"
HOW = ["--max-gen-len", "6", "--dtype", "fp32", "--device", "cpu", "--max-seq-len", "64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "hf"
    write_speaking(path, ARGS)
    return path


@pytest.fixture(scope="module")
def expected(folder):
    model = MetaModel.from_pretrained(folder, dtype=torch.float32, max_seq_len=64, device="cpu")
    return model.generate([PROMPT], max_gen_len=6)[0] + "\n"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(command, env=None, input=None):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, env=env, input=input, timeout=120, check=False)


def torchrun(*words):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    return [*launcher, "-m", "accessory", *words]


def test_n_gpus_starts_ranks_itself(folder, expected, capfd):
    assert main(["generate", str(folder), "--prompt", PROMPT, *HOW, "--n-gpus", "2"]) == 0
    assert capfd.readouterr().out == expected


@pytest.mark.slow
def test_ctrl_c_with_ranks_prints_what_there_is(folder, tmp_path):
    """Ctrl-C comes after the second token."""
    script = (
        "import signal, sys\nfrom accessory.cli import main\nfrom accessory.model.text_model import TextModel\n"
        "complete = TextModel.complete\n"
        "def interrupted(self, *args, on_step, **how):\n"
        "    def note(n):\n"
        "        if n == 2: signal.raise_signal(signal.SIGINT)\n"
        "        on_step(n)\n"
        "    return complete(self, *args, on_step=note, **how)\n"
        "TextModel.complete = interrupted\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, str(tmp_path / "script.py"), "generate", folder, "--prompt", PROMPT, "--n-gpus", "2"]
    done = run([*command, "--max-gen-len", "3000", "--max-seq-len", "4000", "--dtype", "fp32", "--device", "cpu"])
    assert done.returncode == 130, done.stderr
    assert done.stderr == "\ninterrupted\n"
    assert 1 < len(done.stdout) < 100


@pytest.mark.slow
def test_torchrun_prints_once_and_shares_standard_input(folder, expected):
    done = run(torchrun("generate", folder, "--prompt", PROMPT, "--stream", *HOW))
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


def task_of_srun(rank, world, words, port, out):
    """The status of a command that `srun` starts. What it prints goes to `out`, a file for each rank."""
    slurm = {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(world),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": "7",
        "MASTER_PORT": str(port),
    }
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", **slurm})
    with open(f"{out}{rank}", "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        status = main(words)
        sys.stdout.flush()
    return status


def test_srun_ranks_meet_by_slurms_variables(folder, expected, tmp_path):
    words = ["generate", str(folder), "--prompt", PROMPT, *HOW]
    assert run_ranks(task_of_srun, 2, words, free_port(), f"{tmp_path}/", grouped=False) == [0, 0]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [expected, ""]


@pytest.mark.slow
def test_a_mistake_is_told_once(folder):
    done = run(torchrun("generate", folder, "--prompt", PROMPT, *HOW[2:], "--max-gen-len", "0"))
    told = [line for line in done.stderr.splitlines() if line.startswith("accessory: error:")]
    assert len(told) == 1
    assert "--max-gen-len: got 0" in told[0]
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("words", "names"),
    [(["chat"], "chat: started as one of several ranks"), (["generate", "--n-gpus", "2"], "--n-gpus")],
)
def test_what_makes_no_sense_under_a_launcher_says_so(folder, words, names, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    prompt = ["--prompt", PROMPT] if words[0] == "generate" else []
    assert main([words[0], str(folder), *words[1:], *prompt, *HOW]) == 1
    assert names in capsys.readouterr().err


def test_ranks_that_make_no_sense_say_so(folder, capsys):
    assert main(["generate", str(folder), "--prompt", PROMPT, *HOW, "--n-gpus", "0"]) == 1
    assert "gpus: got 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["our own", "torchrun"])
def test_a_file_is_answered_and_gone_on_with(folder, expected, tmp_path, launcher):
    alone = MetaModel.from_pretrained(folder, dtype=torch.float32, max_seq_len=64, device="cpu")
    asked, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text(f'{{"prompt": "{PROMPT}"}}\n{{"prompt": ""}}\n{{"prompt": "Two", "max_gen_len": 9}}\n')
    words = ["generate", folder, *HOW, "--prompt-file", asked, "--lines", "--out", out]
    for kept in (0, 1, 3):  # lines that are there already
        out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:kept]) if kept else b"")
        command = [sys.executable, "-m", "accessory", *words, "--n-gpus", "2"]
        done = run(torchrun(*words) if launcher == "torchrun" else command)
        assert done.stderr.count("1 of 3 prompts could not be answered") == 1
        first, failed, last = map(json.loads, out.read_text().splitlines())
        assert first["text"] + "\n" == expected
        assert list(failed) == ["prompt", "error"]
        assert last["text"] == alone.generate(["Two"], max_gen_len=9)[0]
