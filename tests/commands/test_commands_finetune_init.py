"""`accessory finetune init`: the recipe that it writes, by the planner; `accessory finetune --list`."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.dialogues import dialogue
from helpers.random_models import write_speaking
from helpers.sizes import SPEAKING

import accessory.train.run
from accessory.cli import main
from accessory.commands import plan
from accessory.commands.finetune_options import RECIPES
from accessory.config import MIXTRAL_8X7B
from accessory.data.tokenizer import MIXTRAL_TOKENIZER
from accessory.train.config import FinetuneConfig
from accessory.train.recipe_text import GROUPS

TALK = {"messages": dialogue("What is one and one?", "Two.")}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with data and, by its configuration, Mixtral-8x7B; a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "_present", lambda gpus: None)
    Path("my.jsonl").write_text("\n".join([json.dumps(TALK)] * 40))
    Path("8x7b").mkdir()
    Path("8x7b/config.json").write_text(json.dumps(MIXTRAL_8X7B.to_dict()))
    shutil.copy(MIXTRAL_TOKENIZER, "8x7b/tokenizer.model")
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("init") / "model"
    write_speaking(path, SPEAKING.replace(n_layers=1, max_seq_len=256))
    return path


def test_recipes_are_listed(capsys):
    with pytest.raises(SystemExit) as end:
        main(["finetune", "--list"])
    assert end.value.code == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert all(line.endswith(".") and "  " not in line for line in lines.values()), "a whole sentence"


def test_what_it_writes_passes_a_dry_run_and_trains(model, capsys, monkeypatch):
    words = ["finetune", "init", "tiny.yaml", "--model", str(model), "--data", "my.jsonl"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("tiny.yaml: written: full finetuning on this machine's CPU (")
    written = FinetuneConfig.from_yaml("tiny.yaml")
    assert (written.device, written.precision, written.max_words) == ("cpu", "fp32", 256)
    assert (written.llama_type, written.output_dir) == ("mixtral_sparse", "output/tiny")
    assert main(["finetune", "tiny.yaml", "--dry-run"]) == 0
    Path("shown.yaml").write_text(shown := capsys.readouterr().out)
    assert FinetuneConfig.from_yaml("shown.yaml") == written
    assert "# 40 items, " in shown
    seen = []
    monkeypatch.setattr(accessory.train.run, "finetune", seen.append)
    assert main(["finetune", "tiny.yaml"]) == 0
    assert seen == [written]
    assert sorted(path.name for path in Path().iterdir()) == ["8x7b", "my.jsonl", "shown.yaml", "tiny.yaml"]


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_adapters_by_choice(model, capsys, kind):
    words = ["finetune", "init", "--model", str(model), "--data", "my.jsonl", "--train", kind]
    if kind == "qlora":  # nf4's groups do not fit so narrow a network
        assert main(words) == 1
        assert "memory: QLoRA of " in capsys.readouterr().err
        return
    assert main(words) == 0
    assert main(["finetune", "finetune.yaml", "--dry-run"]) == 0
    written = FinetuneConfig.from_yaml("finetune.yaml")
    assert (written.llama_type, written.lora_rank, written.only_save_trainable) == ("mixtral_sparse_peft", 16, True)


def test_every_field_is_there_with_its_help(model):
    assert main(["finetune", "init", "a.yaml", "--model", str(model), "--data", "my.jsonl", "--train", "lora"]) == 0
    lines = Path("a.yaml").read_text().splitlines()
    fields = {field.name: field.metadata["help"] for field in dataclasses.fields(FinetuneConfig)}
    assert set(GROUPS) <= set(fields)
    found = {m[1]: m[2] for line in lines if (m := re.fullmatch(r"(?:# )?([a-z_]+): .*?  # (.*)", line))}
    assert found == fields
    active = yaml.safe_load("\n".join(lines))
    bare = yaml.safe_load("\n".join(re.sub("^# (?=[a-z_]+: .*  # )", "", line) for line in lines))
    defaults = {f.name: f.default for f in dataclasses.fields(FinetuneConfig) if f.default is not dataclasses.MISSING}
    for name in defaults.keys() - active.keys():
        assert bare[name] == defaults[name], f"{name}: a comment shows the default"


@pytest.mark.parametrize(
    ("card", "gpus", "kind"),
    [
        (["--card", "H100"], 1, "qlora"),
        (["--card", "H200"], 1, "lora"),
        (["--card", "H100"], 2, "lora"),
        (["--gpu-memory", "24"], 2, "qlora"),
        (["--card", "H100"], 32, "full"),
    ],
)
def test_the_first_kind_that_fits(capsys, card, gpus, kind):
    words = ["--model", "8x7b", "--data", "my.jsonl", *card, "--gpus", str(gpus)]
    assert main(["finetune", "init", "a.yaml", *words]) == 0
    capsys.readouterr()
    recipe = FinetuneConfig.from_yaml("a.yaml")
    assert recipe.quant == ("nf4" if kind == "qlora" else False)
    assert recipe.llama_type == ("mixtral_sparse" if kind == "full" else "mixtral_sparse_peft")
    assert recipe.data_parallel_size(gpus) * recipe.model_parallel_size == gpus

    def fits(kind, *words):
        """What `accessory plan` says of a training step on the same cards."""
        cards = [word.replace("--gpu-memory", "--memory") for word in card]
        ours = [f"--gpus={gpus}", f"--max-words={recipe.max_words}", f"--finetune={kind}"]
        return main(["plan", "8x7b", *cards, *ours, *words]) == 0

    words = [f"--{option}={getattr(recipe, name)}" for option, name in (
        ("tp", "model_parallel_size"), ("data-parallel", "data_parallel"), ("batch-size", "batch_size"),
    )]  # fmt: skip
    assert fits(kind, *words, *["--checkpointing"] * recipe.checkpointing)
    for refused in ("full", "lora", "qlora")[: ("full", "lora", "qlora").index(kind)]:
        for tp in (n for n in (1, 2, 4, 8) if gpus % n == 0):
            assert not fits(refused, f"--tp={tp}", "--data-parallel=fsdp", "--batch-size=1", "--checkpointing")


def test_long_items_make_long_rows_up_to_a_limit():
    long = {"messages": dialogue("Count.", "one two " * 700)}
    Path("long.jsonl").write_text("\n".join([json.dumps(long)] * 3))
    words = ["finetune", "init", "--card", "H200", "--model", "8x7b", "--data"]
    assert main([*words, "long.jsonl"]) == 0
    assert FinetuneConfig.from_yaml("finetune.yaml").max_words == 2048, "1400 words, a token each"
    assert main([*words[:2], "short.yaml", *words[2:], "my.jsonl"]) == 0
    assert FinetuneConfig.from_yaml("short.yaml").max_words == 512


def test_a_dry_run_prints_and_writes_nothing(model, capsys):
    before = sorted(Path().iterdir())
    assert main(["finetune", "init", "--model", str(model), "--data", "my.jsonl", "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["pretrained_path"] == str(model)
    assert sorted(Path().iterdir()) == before


REFUSED = {
    "no model": ("init --data my.jsonl", "--model: missing; "),
    "no data": ("init --model 8x7b", "--data: missing; "),
    "a file that is there": ("init old.yaml --model 8x7b --data my.jsonl", "old.yaml: is there already, and is not"),
    "a folder that is not": ("init no/a.yaml --model 8x7b --data my.jsonl", "no/a.yaml: no is no folder that is there"),
    "no YAML": ("init a.txt --model 8x7b --data my.jsonl", "a.txt: a recipe is a YAML file"),
    "two files": ("init a.yaml b.yaml --model 8x7b --data my.jsonl", "b.yaml: one word too many"),
    "a value": ("init a.yaml lr=1 --model 8x7b --data my.jsonl", "lr=1: init takes no key=value"),
    "no such model": ("init --model none --data my.jsonl", "none: no such file or folder"),
    "no such data": ("init --model 8x7b --data none.jsonl", "--data: none.jsonl: no such file"),
    "no data in it": ("init --model 8x7b --data old.yaml --card H200", "old.yaml: expected META"),
    "a bad item": ("init --model 8x7b --data bad.jsonl --card H200", "bad.jsonl:2: not valid JSON ("),
    "no GPU": ("init --model 8x7b --data my.jsonl --gpus 2", "--gpus: no GPU is here; say which ones with --card"),
    "gpus 0": ("init --model 8x7b --data my.jsonl --gpus 0", "--gpus: got 0, but"),
    "no such card": ("init --model 8x7b --data my.jsonl --card H1000", "card: got 'H1000', but known are B200, "),
    "two cards": (
        "init --model 8x7b --data my.jsonl --card H100 --gpu-memory 80",
        "--gpu-memory: both say how",
    ),
    "no memory": ("init --model 8x7b --data my.jsonl --gpu-memory 0", "--gpu-memory: got 0, but"),
    "too small": (
        "init --model 8x7b --data my.jsonl --gpu-memory 24",
        "memory: full finetuning, LoRA, QLoRA of 8x7b cannot fit 1 × 24 GB (24.0 GB); 2 such cards would do",
    ),
    "asked for": (
        "init --model 8x7b --data my.jsonl --card H200 --train full",
        "memory: full finetuning of 8x7b cannot fit 1 × H200 (150.0 GB); 8 such cards would do",
    ),
    "ranks": ("init --model 8x7b --data my.jsonl --n-gpus 2", "--n-gpus: starts ranks; for init, --gpus says"),
    "of a recipe": ("lora_one_gpu --model 8x7b", "--model: is for `accessory finetune init`"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_one_line_and_writes_nothing(words, message, capsys, here):
    Path("old.yaml").write_text("mine: 1\n")
    Path("bad.jsonl").write_text(f"{json.dumps(TALK)}\n{{\n")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert main(["finetune", *words.split()]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("accessory: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_a_file_called_init_is_a_recipe(model, monkeypatch):
    fields = {"pretrained_path": str(model), "data_config": "my.jsonl", "output_dir": "out"}
    Path("init").write_text(yaml.safe_dump(fields))
    seen = []
    monkeypatch.setattr(accessory.train.run, "finetune", seen.append)
    assert main(["finetune", "init", "lr=1e-3"]) == 0
    assert seen == [FinetuneConfig(**fields, lr=1e-3)]
