"""The flags of `main_finetune.py`: the original's, with the same names and meanings, and ours."""

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from accessory import main_finetune
from accessory.errors import ConfigError
from accessory.main_finetune import main, parser, read_flags
from accessory.train.config import FinetuneConfig
from accessory.train.options import POSITIVE, option

PACKAGE = Path(main_finetune.__file__).parent
NEEDED = ["--pretrained_path", "model", "--data_config", "data.yaml"]


def parse(*words):
    return read_flags(*parser().parse_known_args([*NEEDED, *words]))


def test_every_field_is_a_flag_with_help():
    told = {action.dest: action.help for action in parser()._actions if action.help != argparse.SUPPRESS}
    for field in dataclasses.fields(FinetuneConfig):
        assert field.metadata["help"]
        assert told[field.name].startswith(field.metadata["help"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongerConfig(FinetuneConfig):
    sharpness: float = option(0.5, "how sharp it gets", POSITIVE)


def test_a_new_field_is_one_line(tmp_path):
    """One line gives the field its flag, help text, YAML key and check, and its place in the saved configuration."""
    flags = parser(LongerConfig)
    assert "--sharpness X         how sharp it gets (default: 0.5)" in flags.format_help()
    given = flags.parse_args([*NEEDED, "--sharpness", "2"])
    config, _ = read_flags(given, config=LongerConfig)
    assert isinstance(config, LongerConfig)
    assert config.sharpness == config.to_dict()["sharpness"] == 2.0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pretrained_path: m\ndata_config: d\noutput_dir: o\nsharpness: 3\n")
    assert LongerConfig.from_yaml(recipe).sharpness == 3.0
    with pytest.raises(ConfigError, match="unknown key 'sharpness'"):
        FinetuneConfig.from_yaml(recipe)
    with pytest.raises(ConfigError, match=r"sharpness: got -1\.0, but it must be more than 0"):
        LongerConfig.from_yaml(recipe, ["sharpness=-1"])


def test_flags_that_are_left_out_mean_what_they_mean_in_the_original():
    config, notes = parse()
    got = {name: getattr(config, name) for name in "batch_size accum_iter weight_decay clip_grad max_words".split()}
    assert got == {"batch_size": 16, "accum_iter": 4, "weight_decay": 0.02, "clip_grad": -1.0, "max_words": 1024}
    assert (config.dialog, config.checkpointing, config.only_save_trainable, config.quant) == (False,) * 4
    assert (config.output_dir, config.save_interval, config.save_iteration_interval) == ("./output_dir", 1, 5000)
    assert (config.data_parallel, config.precision, config.model_parallel_size) == ("sdp", "bf16", 1)
    assert (config.seed, config.pin_mem, config.num_workers, config.resume) == (0, True, 2, None)
    assert config.packing, "ours"
    assert not notes


def test_all_flags_of_the_original_are_taken():
    words = """--batch_size 2 --accum_iter 3 --llama_type mixtral_peft --llama_config a.json b.json --no_visual
        --tokenizer_path t.model --pretrained_type consolidated --weight_decay 0.1 --lr 0.00002 --min_lr 0.000001
        --epochs 4 --warmup_epochs 0.5 --clip_grad 2 --max_words 77 --dialog --image_transform padded_resize
        --cache_ann_on_disk --output_dir o --log_dir l --save_interval 2 --save_iteration_interval 9
        --only_save_trainable --device cpu --seed 5 --num_workers 7 --no_pin_mem --world_size 8 --local_rank 0
        --dist_on_itp --dist_url env:// --model_parallel_size 2 --data_parallel fsdp --precision tf32 --checkpointing
        --quant --resume auto""".split()
    config, notes = parse(*words, "--pretrained_path", "base", "adapter")
    assert config == FinetuneConfig(
        batch_size=2, accum_iter=3, llama_type="mixtral_peft", llama_config=["a.json", "b.json"], no_visual=True,
        tokenizer_path="t.model", weight_decay=0.1, lr=2e-5, min_lr=1e-6, epochs=4, warmup_epochs=0.5, clip_grad=2,
        max_words=77, dialog=True, image_transform="padded_resize", cache_ann_on_disk=True, output_dir="o",
        save_interval=2, save_iteration_interval=9, only_save_trainable=True, device="cpu", seed=5, num_workers=7,
        pin_mem=False, model_parallel_size=2, data_parallel="fsdp", precision="tf32", checkpointing=True, quant="nf4",
        resume="auto", pretrained_path=["base", "adapter"], data_config="data.yaml",
    )  # fmt: skip
    ignored = ["pretrained_type", "log_dir", "world_size", "local_rank", "dist_url", "dist_on_itp"]
    assert [note.split()[0] for note in notes] == [f"--{name}" for name in ignored]
    assert all("\n" not in note for note in notes)


def test_dashes_are_underscores_and_switches_turn_off_again():
    config, _ = parse("--max-words", "5", "--no-packing", "--lora-targets", "wq", "w1", "--dialog", "--no_dialog")
    assert (config.max_words, config.packing, config.lora_targets) == (5, False, ("wq", "w1"))
    assert not config.dialog
    assert parse("--no_packing", "--packing")[0].packing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batchsize", "3"], "--batchsize: unknown; did you mean --batch_size?"),
        (["--batch", "3"], "--batch: unknown; "),  # no abbreviations: a new flag could change their meaning
        (["--data_parallel", "ddp"], "data_parallel: got 'ddp', but it must be one of sdp, fsdp"),
        (["--lr", "fast"], "lr: got 'fast'"),
        (["--lr", "1", "y"], "y: unknown; --help lists all flags"),
    ],
)
def test_wrong_flags(words, message):
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    assert str(caught.value).startswith(message)


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match=r"^--pretrained_path, --data_config: missing"):
        read_flags(parser().parse_args([]))


def test_a_mistake_is_one_line_and_status_1(capsys):
    assert main(NEEDED) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "accessory: error: pretrained_path: got 'model', but it must be a file or folder that is there\n"
    )


def test_the_run_gets_what_the_flags_say(monkeypatch, tmp_path, capsys):
    import accessory.train.run

    seen = []
    monkeypatch.setattr(accessory.train.run, "finetune", seen.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "data.yaml").touch()
    assert main([*NEEDED, "--lr", "3e-4", "--pretrained_type", "consolidated"]) == 0
    assert seen == [parse("--lr", "3e-4")[0]]
    assert capsys.readouterr().out.startswith("note: --pretrained_type is ignored: ")


@pytest.mark.parametrize("command", [["main_finetune.py"], ["-m", "accessory.main_finetune"]])
def test_it_starts_as_on_the_page_and_as_a_module(command):
    """Runs inside accessory/. Python must not take the folders there for top-level modules of the same name."""
    cwd = PACKAGE if command[0] == "main_finetune.py" else PACKAGE.parent
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--save_iteration_interval" in done.stdout
