"""`accessory finetune`: recipes by name, dry runs, ranks of its own, and how commands of several ranks end."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from helpers.random_models import write_speaking
from helpers.runs import snapshot
from helpers.sizes import SPEAKING
from safetensors.torch import load_file, save_file

import accessory.train.run
from accessory.cli import main
from accessory.commands.finetune import RECIPES, find_recipe
from accessory.errors import ConfigError
from accessory.train.config import FinetuneConfig

ARGS = SPEAKING.replace(n_layers=1, max_seq_len=256)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a tiny model and its data."""
    path = tmp_path_factory.mktemp("finetune")
    write_speaking(path / "model", ARGS)
    turns = [{"from": "human", "value": "What is one and one?"}, {"from": "gpt", "value": "Two."}]
    (path / "data.json").write_text(json.dumps([{"conversations": turns}] * 8))
    (path / "data.yaml").write_text(f"META:\n  - path: {path}/data.json\n    type: text\n")
    return path


@pytest.fixture
def fields(made, tmp_path):
    return [
        f"pretrained_path={made}/model",
        f"data_config={made}/data.yaml",
        f"output_dir={tmp_path}/out",
        "max_words=64",
    ]


@pytest.fixture
def seen(monkeypatch):
    """Replaces training; collects the configurations that it is started with."""
    configs: list[FinetuneConfig] = []
    monkeypatch.setattr(accessory.train.run, "finetune", configs.append)
    return configs


def refused(capsys, *words):
    assert main(["finetune", *map(str, words)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("accessory: error: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_every_recipe_is_found_by_its_name_and_is_whole(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = find_recipe(name)
    assert path == find_recipe(f"configs/finetune/{name}.yaml") == RECIPES / f"{name}.yaml"
    FinetuneConfig.from_yaml(path, ["pretrained_path=model", "data_config=data.yaml", "output_dir=out"])
    assert set(yaml.safe_load(path.read_text())) <= set(FinetuneConfig.__dataclass_fields__)


def test_a_file_here_comes_before_a_recipe(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full_base").write_text("lr: 1\n")
    assert find_recipe("full_base").resolve() == tmp_path / "full_base"
    with pytest.raises(ConfigError, match="nothing: no such file, and no recipe of that name; there are full_base, "):
        find_recipe("nothing")


def test_overrides_may_stand_anywhere(seen, fields):
    first, *rest = fields
    assert main(["finetune", "lora_one_gpu", first, "--n-gpus", "1", *rest, "lr=3e-4", "--debug"]) == 0
    assert seen == [FinetuneConfig.from_yaml(RECIPES / "lora_one_gpu.yaml", [*fields, "lr=3e-4"])]


def test_a_dry_run_shows_the_recipe_and_writes_nothing(seen, fields, capsys, tmp_path):
    assert main(["finetune", "lora_one_gpu", "--dry-run", "--n-gpus", "4", "model_parallel_size=2", *fields]) == 0
    out = capsys.readouterr().out
    shown = tmp_path / "shown.yaml"
    shown.write_text(out)
    expected = FinetuneConfig.from_yaml(RECIPES / "lora_one_gpu.yaml", ["model_parallel_size=2", *fields])
    assert FinetuneConfig.from_yaml(shown) == expected
    assert "# 4 ranks = 2 model-parallel × 2 data-parallel\n" in out
    assert "# a step: 32 rows = 1 × 16 × 2, at most 2,048 tokens\n" in out
    assert "lora_rank 16, lora_alpha 32.0, lora_targets wq wk wv wo w1 w2 w3" in out
    assert "torchrun --nproc-per-node=4 -m accessory finetune lora_one_gpu model_parallel_size=2" in out
    assert not seen
    assert not (tmp_path / "out").exists()


def test_a_dry_run_reads_the_model(fields, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no checkpoint" in refused(capsys, "lora_one_gpu", *fields, f"pretrained_path={tmp_path}/empty", "--dry-run")
    assert "lora_rank" in refused(capsys, "lora_one_gpu", *fields, "lora_rank=-1", "--dry-run")


REFUSED = {
    "misspelt key of the data list": (
        ["data_config={tmp}/typ.yaml"],
        "META[0]: unknown key 'typ'; did you mean 'type",
    ),
    "missing data file": (["data_config={tmp}/gone.yaml"], "gone.yaml: META[0]: path: gone.json: no such file"),
    "broken list of held-out data": (["eval_data={tmp}/typ.yaml"], "typ.yaml: META[0]: unknown key 'typ'"),
    "no model": (["pretrained_path=nowhere"], "pretrained_path: got 'nowhere', but it must be a file or folder"),
    "model without a tensor": (["pretrained_path={tmp}/lacking"], "missing tensors: norm.weight"),
    "no tokenizer": (["tokenizer_path={tmp}"], "{tmp}: no tokenizer in this folder"),
    "no template": (["template=tokenizer"], "template: 'tokenizer' is the tokenizer's own chat template, but"),
    "folder below a file": (["output_dir={tmp}/typ.yaml/run"], "cannot be written ({tmp}/typ.yaml: Not a directory)"),
    "folder of another run": (["output_dir={tmp}/used", "resume=null"], "output_dir: {tmp}/used holds a run already"),
    "no state": (["resume={tmp}"], "{tmp}: holds no state.json"),
    "logger": (["loggers=trackio"], "loggers: trackio needs the package trackio: pip install"),
    "ranks": (["model_parallel_size=3"], "must be a multiple of it"),
    "device": (["device=cuda:99"], "device: got 'cuda:99', but torch"),
    "sizes": (["llama_config={tmp}/sizes.json"], "hidden_dim: {tmp}/sizes.json, config.json says 64"),
}


@pytest.mark.parametrize("how", ["dry run", "driver of ranks", "run"])
@pytest.mark.parametrize("name", REFUSED)
def test_the_same_is_refused_before_the_first_step(made, fields, capsys, monkeypatch, tmp_path, how, name):
    """By a dry run, by the process that would start ranks, and by a run, which has then built no network."""
    (tmp_path / "typ.yaml").write_text("META: [{path: gone.json, typ: text}]")
    (tmp_path / "gone.yaml").write_text("META: [{path: gone.json, type: text}]")
    (tmp_path / "sizes.json").write_text('{"hidden_dim": 64}')
    shutil.copytree(made / "model", tmp_path / "lacking")
    tensors = load_file(tmp_path / "lacking" / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "lacking" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").touch()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "trackio" else find_spec(n, *a))
    monkeypatch.setattr("accessory.commands.finetune.run_under_torchrun", lambda *_, **__: pytest.fail("started ranks"))
    monkeypatch.setattr("accessory.build.network.fill", lambda *_, **__: pytest.fail("loaded weights"))
    changes = [change.format(tmp=tmp_path) for change in REFUSED[name][0]]
    message = REFUSED[name][1].format(tmp=tmp_path)
    options = {"dry run": ["--dry-run", "--n-gpus", "2"], "driver of ranks": ["--n-gpus", "2"], "run": []}[how]
    before = snapshot(tmp_path)
    told = refused(capsys, "lora_one_gpu", *fields, "device=cpu", *changes, *options)
    assert message in told
    assert how == "run" or snapshot(tmp_path) == before


def test_adapters_of_another_rank_are_refused_before_the_first_step(made, fields, capsys, tmp_path):
    words = ["lora_one_gpu", *fields, "device=cpu", "precision=fp32"]
    assert main(["finetune", *words, "lora_rank=4", "max_steps=1", "accum_iter=1"]) == 0
    capsys.readouterr()
    words += [f"pretrained_path=[{made}/model, {tmp_path}/out/final]", f"output_dir={tmp_path}/more"]
    told = refused(capsys, *words, "--dry-run")
    assert "tensors of another shape than the configuration says: " in told
    assert refused(capsys, *words, "--n-gpus", "2") == refused(capsys, *words) == told


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"image": "a.png", "instruction": "q", "output": "a"}, "bad.jsonl:1: image: this item has one, and the model"),
        ({"words": "x"}, "bad.jsonl:1: no dialogue and no single turn"),
    ],
)
def test_a_dry_run_reads_every_item_and_keeps_nothing(fields, capsys, tmp_path, item, message):
    (tmp_path / "bad.jsonl").write_text(json.dumps(item))
    (tmp_path / "bad.yaml").write_text(f"META: [{{path: {tmp_path}/bad.jsonl}}]")
    words = [*fields, f"data_config={tmp_path}/bad.yaml", "cache_ann_on_disk=true", "--dry-run"]
    assert message in refused(capsys, "lora_one_gpu", *words)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"instruction": "q", "output": "a"}))
    before = snapshot(tmp_path)
    assert main(["finetune", "lora_one_gpu", *words]) == 0
    assert "# 1 items, " in capsys.readouterr().out
    assert snapshot(tmp_path) == before


def test_a_dry_run_fetches_no_model(fields, capsys):
    remote = [*fields, "pretrained_path=hf://owner/name", "--dry-run"]
    assert main(["finetune", "lora_one_gpu", *remote]) == 0
    assert "the model would have to be downloaded" in capsys.readouterr().out
    assert "'cuda:99'" in refused(capsys, "lora_one_gpu", *remote, "device=cuda:99")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr=fast"], "lr: got 'fast', but it must be a number"),
        (["model_parallel_size=2"], "model_parallel_size: got 2, but the number of ranks, 1,"),
        (["model_parallel_size=4", "--n-gpus", "2"], "model_parallel_size: got 4, but the number of ranks, 2,"),
        (["eval_data=absent.yaml", "--n-gpus", "2"], "eval_data: got 'absent.yaml'"),
        (["--n-gpus", "0"], "--n-gpus: got 0"),
    ],
)
def test_mistakes_are_one_line(seen, fields, capsys, words, message):
    assert message in refused(capsys, "lora_one_gpu", *fields, *words)
    assert not seen


def test_ranks_of_a_launcher_start_none_themselves(fields, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "--n-gpus: this process is one of several" in refused(capsys, "lora_one_gpu", *fields, "--n-gpus", "2")


def test_more_ranks_than_gpus_are_refused(fields, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "--n-gpus: got 3, but this machine shows 2 GPUs" in refused(capsys, "lora_one_gpu", *fields, "--n-gpus", "3")


def test_a_full_memory_says_what_was_asked_for_and_what_needs_less(fields, capsys, monkeypatch):
    import torch

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore")

    monkeypatch.setattr(accessory.train.run, "build", full)
    told = refused(capsys, "lora_one_gpu", *fields, "device=cpu")
    assert "memory ran out: 1 GiB more were asked for; lora finetuning (lora_rank 16, batch_size 1" in told
    assert "lora_rank 8; or " in told


def test_a_run_that_cannot_fit_is_refused_before_its_data_are_encoded(fields, capsys, monkeypatch):
    monkeypatch.setattr(accessory.train.run, "open_training_data", None)
    told = refused(capsys, "lora_one_gpu", *fields, "device=cpu", "lora_rank=1000000000")
    assert "memory: lora finetuning (lora_rank 1000000000" in told
    assert "this machine has" in told
    assert "; lora_rank " in told


def test_a_dry_run_refuses_what_this_machine_is_too_small_for(fields, capsys):
    words = [*fields, "device=cpu", "--dry-run"]
    told = refused(capsys, "lora_one_gpu", *words, "lora_rank=1000000000", "model_parallel_size=2", "--n-gpus=2")
    assert "memory: lora finetuning (lora_rank 1000000000" in told
    assert "on 2 ranks takes at least" in told
    assert main(["finetune", "lora_one_gpu", *words]) == 0


# --------------------------------------------------------------------------- ranks of its own


@pytest.mark.slow
def test_a_recipe_on_two_ranks_of_its_own(fields, tmp_path):
    words = ["lora_one_gpu", *fields, "precision=fp32", "accum_iter=2", "epochs=1", "device=cpu", "--n-gpus", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "accessory", "finetune", *words],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "final").is_dir()
    again = FinetuneConfig.from_yaml(tmp_path / "out" / "config.yaml")
    assert again == FinetuneConfig.from_yaml(RECIPES / "lora_one_gpu.yaml", words[1:-2])
    told = subprocess.run(
        [sys.executable, "-m", "accessory", "finetune", *words, "resume=null"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert told.returncode == 1
    assert told.stderr.startswith("accessory: error: output_dir: ")
    assert told.stderr.count("\n") == 1, told.stderr


# --------------------------------------------------------------------------- ends

SPEAKS = """
import sys
from accessory.commands import outcome
from accessory.errors import *
outcome.FIRST_SPEAKS = 0
def run():
    print("working", flush=True)
    raise {}
sys.exit(outcome.outcome(run))
"""


@pytest.mark.parametrize(
    ("error", "rank", "out", "err"),
    [
        ("ConfigError('lr: no')", 0, "working\n", "accessory: error: lr: no\n"),
        ("ConfigError('lr: no')", 1, "", ""),
        (
            "OSError(28, 'No space left on device', '/x')",
            1,
            "",
            "accessory: error: rank 1: /x: No space left on device\n",
        ),
        ("RankError('lost')", 1, "", "accessory: error: rank 1: lost\n"),
    ],
)
def test_of_several_ranks_those_speak_that_have_something_to_say(error, rank, out, err):
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", SPEAKS.format(error)], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, out, err)
