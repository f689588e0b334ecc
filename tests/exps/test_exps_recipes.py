"""The recipes of exps/, run as on the tutorial's page: with three arguments, in every task of srun or torchrun."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.random_models import write_speaking
from helpers.sizes import SPEAKING

import accessory
from accessory.main_finetune import parser, read_flags
from accessory.train.config import FinetuneConfig

PACKAGE = Path(accessory.__file__).parent
EXPS = "exps/finetune/sg/dialog_ultrachat200kWizardcode_{}.sh"
PATHS = ["/path/to/converted", "/path/to/converted/config.json", "/path/to/converted/tokenizer.model"]
PEFT_JSON = "configs/model/finetune/sg/llamaPeft_normBiasLora.json"
SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "32", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}

# The table of the original recipes: full base, full sparse and PEFT base. PEFT sparse follows from them.
COMMON = {
    "epochs": 1.0, "warmup_epochs": 0.1, "max_words": 4096, "min_lr": 0.0, "clip_grad": 2.0, "weight_decay": 0.0,
    "precision": "bf16", "checkpointing": True, "data_parallel": "sdp", "accum_iter": 8, "dialog": True,
}  # fmt: skip
FULL = {**COMMON, "lr": 5e-6, "batch_size": 4, "model_parallel_size": 8}
PEFT = {**COMMON, "lr": 2e-5, "batch_size": 8, "model_parallel_size": 4}
RECIPES = {
    "mixtral": ("full_base", 32, FULL | {"llama_type": "mixtral"}),
    "mixtralSparse": ("full_sparse", 32, FULL | {"llama_type": "mixtral_sparse"}),
    "mixtralPeft": ("peft_base", 16, PEFT | {"llama_type": "mixtral_peft"}),
    "mixtralSparsePeft": ("peft_sparse", 16, PEFT | {"llama_type": "mixtral_sparse_peft"}),
}

RECORDER = f"""#!{sys.executable}
import json, os, sys
json.dump(sys.argv[1:], open(os.environ["RECORD"], "w"))
print("trained", file=sys.stderr)
sys.exit(int(os.environ.get("STATUS", 0)))
"""
WAITER = f"""#!{sys.executable}
import signal, sys, time
def save(*_):
    print("saved\\n", end="", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, save)
print("ready\\n", end="", flush=True)  # in one piece, even where nothing is buffered
time.sleep(60)
"""


@pytest.fixture
def place(tmp_path):
    """A stand-in for the checkout's accessory/, where output may be written."""
    path = tmp_path / "accessory"
    path.mkdir()
    for name in ("exps", "configs", "main_finetune.py"):
        (path / name).symlink_to(PACKAGE / name)
    (tmp_path / "bin").mkdir()
    return path


def environment(place, stub, **variables):
    python = place.parent / "bin" / "python"
    python.write_text(stub)
    python.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_")) and k != "RANK"}
    path = f"{python.parent}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "RECORD": str(place.parent / "argv.json"), **variables}


def run(place, script, *words, stub=RECORDER, **variables):
    return subprocess.run(
        ["bash", EXPS.format(script), *words],
        cwd=place, env=environment(place, stub, **variables), capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def recorded(place):
    program, *rest = json.loads((place.parent / "argv.json").read_text())[1:]
    assert Path(program) == place / "main_finetune.py"
    options, unknown = parser().parse_known_args(rest)
    return read_flags(options, unknown)[0]


@pytest.mark.parametrize("script", RECIPES)
def test_a_recipe_is_the_tables_column(place, script):
    recipe, world, figures = RECIPES[script]
    done = run(place, script, *PATHS, **SRUN)
    name = f"finetune/sg/dialog_ultrachat200kWizardcode_{script}"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"exp name: {name}\ntrained\n"
    assert (place / "output" / name / "output.log").read_text() == "trained\n"

    config = recorded(place)
    assert {key: getattr(config, key) for key in figures} == figures
    assert (config.pretrained_path, config.llama_config[0], config.tokenizer_path) == (PATHS[:1], *PATHS[1:])
    assert config.data_parallel_size(world) == 4
    assert config.output_dir == f"output/{name}"
    assert config.data_config.endswith("configs/data/finetune/sg/dialog_ultrachat200kWizardcode.yaml")
    if "Peft" in script:
        assert config.llama_config[1:] == [str(PACKAGE / PEFT_JSON)]
        assert json.loads((PACKAGE / PEFT_JSON).read_text()) == {"lora_rank": 16, "bias_tuning": True}
    else:
        assert config.llama_config[1:] == []

    # The YAML of a recipe describes the same run. It has keys for LoRA and for tuning biases and norms where the script
    # names a JSON file.
    yaml = FinetuneConfig.from_yaml(
        PACKAGE / "configs" / "finetune" / f"{recipe}.yaml", [f"pretrained_path={PATHS[0]}"]
    )
    differ = {k for k, v in yaml.to_dict().items() if v != getattr(config, k)}
    peft = {"lora_rank", "bias_tuning", "norm_tuning"} if "Peft" in script else set()
    assert config.no_visual  # the original's scripts set it even for models that take no images
    assert differ == {"llama_config", "tokenizer_path", "no_visual"} | peft
    assert not peft or (yaml.lora_rank, yaml.bias_tuning, yaml.norm_tuning) == (16, True, True)


def test_more_flags_win_and_the_output_may_go_elsewhere(place):
    more = ["--lr", "1e-4", "--model_parallel_size", "1", "--no_packing", "--loggers", "wandb"]
    assert run(place, "mixtral", *PATHS, *more, OUTPUT_DIR=str(place.parent / "my runs")).returncode == 0
    config = recorded(place)
    assert (config.lr, config.model_parallel_size, config.packing, config.loggers) == (1e-4, 1, False, ["wandb"])
    assert config.output_dir == str(place.parent / "my runs")
    assert (place.parent / "my runs" / "output.log").exists()
    assert not (place / "output").exists()


def test_paths_with_spaces_stay_whole(place):
    assert run(place, "mixtralPeft", "/my model", "/my model/config.json", "/my tokenizer").returncode == 0
    config = recorded(place)
    assert (config.pretrained_path, config.tokenizer_path) == (["/my model"], "/my tokenizer")
    assert config.llama_config == ["/my model/config.json", str(PACKAGE / PEFT_JSON)]


def test_only_the_first_task_says_its_name(place):
    assert run(place, "mixtral", *PATHS, **{**SRUN, "SLURM_PROCID": "5"}).stdout == "trained\n"
    assert run(place, "mixtral", *PATHS, RANK="1").stdout == "trained\n"


def test_the_status_is_pythons(place):
    assert run(place, "mixtral", *PATHS, STATUS="7").returncode == 7


def test_three_arguments_are_needed(place):
    done = run(place, "mixtral", *PATHS[:2])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: bash exps/finetune/sg/")
    assert not (place.parent / "argv.json").exists()


def test_an_output_that_cannot_be_written_ends_it(place):
    (place / "output").touch()
    done = run(place, "mixtral", *PATHS)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert not (place.parent / "argv.json").exists()


def test_signals_reach_python_and_its_last_words_the_log(place):
    process = subprocess.Popen(
        ["bash", EXPS.format("mixtral"), *PATHS],
        cwd=place, env=environment(place, WAITER), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log = place / "output" / "finetune" / "sg" / "dialog_ultrachat200kWizardcode_mixtral" / "output.log"
    waited = time.monotonic()
    while not (log.exists() and "ready" in log.read_text()):
        assert time.monotonic() - waited < 20
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # as torchrun does; Slurm signals all of a step's processes, tee too
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 3
    assert out.endswith("ready\nsaved\n")
    assert log.read_text() == "ready\nsaved\n"


@pytest.mark.slow
def test_two_tasks_of_srun_train_a_model(place):
    """The page's command with a model of a few thousand parameters, on processors."""
    made, model = place.parent / "made", place.parent / "made" / "model"
    write_speaking(model, SPEAKING.replace(n_layers=1))
    turns = [{"from": "human", "value": "What is one and one?"}, {"from": "gpt", "value": "Two."}]
    (made / "data.json").write_text(json.dumps([{"conversations": turns}] * 8))
    (made / "data.yaml").write_text(f"META:\n  - path: {made}/data.json\n    type: text\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    more = [
        "--data_config",
        f"{made}/data.yaml",
        "--model_parallel_size",
        "2",
        "--precision",
        "fp32",
        "--max_words",
        "64",
    ]
    more += ["--batch_size", "1", "--accum_iter", "2", "--device", "cpu"]
    tasks = []
    for rank in "01":
        slurm = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_PORT": port}
        variables = environment(
            place, RECORDER, **slurm, SLURM_STEP_NODELIST="localhost", PYTHON=sys.executable,
            OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
        )  # fmt: skip
        command = [
            "bash",
            EXPS.format("mixtralSparsePeft"),
            model,
            model / "config.json",
            model / "tokenizer.model",
            *more,
        ]
        task = subprocess.Popen(
            command, cwd=place, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        tasks.append(task)
    texts = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], texts
    output = place / "output" / "finetune" / "sg" / "dialog_ultrachat200kWizardcode_mixtralSparsePeft"
    assert (output / "report.html").is_file()
    assert list((output / "final").glob("consolidated.*-of-02.model.pth"))
    assert "cannot become" in texts[0] or "never become" in texts[0], "biases are told of before training"
    assert "biases" not in texts[1]


def test_the_recipes_are_clean_shell(place):
    scripts = [PACKAGE / "exps" / "common.sh", *sorted((PACKAGE / "exps").rglob("*/*.sh"))]
    assert len(scripts) == 5
    for script in scripts:
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    if shutil.which("shellcheck") is not None:
        assert subprocess.run(["shellcheck", "-x", *scripts], check=False).returncode == 0
