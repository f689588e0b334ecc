"""Runs that are started wrongly: a one-line error before the first step, and no file is lost or written."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import runs, started_runs

from accessory.commands.finetune import carry_out
from accessory.errors import AccessoryError, ConfigError
from accessory.train.config import FinetuneConfig

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "bias_tuning": True}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["output_dir", "holds a run already", "resume=auto", "overwrite=true"]),
        ({"resume": "auto", "seed": 3}, ["learnt from other data"]),
        ({"resume": "auto", "packing": True}, ["learnt from other data"]),
        ({"resume": "auto", **LORA}, ["trained other adapters", "lora_rank"]),
        ({"resume": "auto", "train_router": True}, ["router"]),
        ({"resume": "auto", "model_parallel_size": 2}, ["model_parallel_size: got 2", "number of ranks, 1"]),
        ({"resume": "auto", "context_parallel_size": 2}, ["context_parallel_size: got 2", "number of ranks, 1"]),
        ({"resume": "auto", "context_parallel_size": 3}, ["max_words = 128 must be a multiple of 2 × 3"]),
        ({"resume": "auto", "expert_parallel_size": 2}, ["expert_parallel_size: got 2", "data-parallel ranks, 1"]),
        ({"overwrite": True, "data_config": "nowhere.yaml"}, ["nowhere.yaml"]),
    ],
)
def test_a_run_is_not_spoiled_by_a_wrong_start(inputs, part, tmp_path, changes, words):
    output = tmp_path / "run"
    shutil.copytree(part, output)
    runs.refused(inputs, output, *words, **changes)


def test_other_models_and_data_are_not_gone_on_with(inputs, part, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(part, output)
    other = runs.write_model(tmp_path / "weights", seed=1)
    runs.refused(inputs, output, "other weights", resume="auto", pretrained_path=[str(other)])
    larger = runs.write_model(tmp_path / "sizes", hidden_dim=64)
    runs.refused(inputs, output, "hidden_dim 48 there, 64 here", resume="auto", pretrained_path=[str(larger)])
    data = runs.write_data(tmp_path, runs.dialogues(seed=5))
    runs.refused(inputs, output, "other data", resume="auto", data_config=str(data))


def test_another_rank_of_lora_is_refused(inputs, tmp_path):
    output = tmp_path / "run"
    runs.finetune(inputs, output, max_steps=1, **LORA)
    runs.refused(inputs, output, "lora_rank 4 there, 8 here", resume="auto", **LORA | {"lora_rank": 8})


def test_a_damaged_state_is_named(inputs, part, tmp_path):
    for number, harm in enumerate((Path.unlink, lambda file: os.truncate(file, file.stat().st_size - 8))):
        output = tmp_path / f"run{number}"
        shutil.copytree(part, output)
        (file,) = (output / "states" / "step-00000004").glob("*.safetensors")
        harm(file)
        runs.refused(inputs, output, str(file), "remove this state", resume="auto")
        shutil.rmtree(file.parent)
        runs.interrupt(inputs, output, 4, resume="auto")
        runs.same_curve(runs.curve(output), runs.curve(part))


def test_a_folder_of_another_run_is_not_mixed_with(inputs, part, whole, tmp_path):
    shutil.copytree(part, tmp_path / "run")
    runs.refused(inputs, tmp_path / "run", "holds another run", resume=str(whole))


def test_overwriting_begins_anew(inputs, part, whole, tmp_path):
    shutil.copytree(part, tmp_path / "run")
    runs.interrupt(inputs, tmp_path / "run", 2, overwrite=True)
    runs.same_curve(runs.curve(tmp_path / "run"), runs.curve(whole)[:2])
    assert [p.name for p in (tmp_path / "run" / "states").iterdir()] == ["step-00000002"]


def test_experts_that_ranks_cannot_share_evenly(inputs, tmp_path):
    config = FinetuneConfig(**runs.options(inputs, tmp_path / "run", expert_parallel_size=3))
    with pytest.raises(ConfigError, match=r"^expert_parallel_size: got 3, but it must divide moe.num_experts, 4$"):
        carry_out(config, dry_run=True, world=3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_output_folder_that_cannot_be_written(inputs, tmp_path, ranks):
    (tmp_path / "file").write_text("in the way")
    fields = runs.options(inputs, tmp_path / "run") | {"output_dir": str(tmp_path / "file" / "run")}
    started = started_runs.start(fields, ranks=ranks, logs=tmp_path / "logs")
    assert started.wait(60) == [1] * ranks
    (line,) = started.errors()
    assert "output_dir" in line
    assert "cannot be written" in line


BAD_LINES = {
    "not JSON": ("{'conversations': []}", "not valid JSON"),
    "unknown role": ('{"conversations": [{"from": "wizard", "value": "hello"}]}', "wizard"),
    "empty conversation": ('{"conversations": []}', "empty"),
    "an image for no eyes": (json.dumps(runs.dialogues(1)[0] | {"image": "there.png"}), "the model looks at none"),
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_of_data(inputs, tmp_path, bad):
    line, told = BAD_LINES[bad]
    data = runs.write_data(tmp_path, [*runs.dialogues(), line, *runs.dialogues(3)])
    with pytest.raises(AccessoryError, match=r"data\.jsonl:25") as caught:
        runs.finetune(inputs, tmp_path / "run", data_config=str(data))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_ranks_end_together_on_a_bad_line(inputs, tmp_path):
    data = runs.write_data(tmp_path, [*runs.dialogues(), BAD_LINES["unknown role"][0]])
    fields = runs.options(inputs, tmp_path / "run", data_config=str(data), cache_ann_on_disk=True)
    started = started_runs.start(fields, ranks=2)
    assert started.wait(60) == [1, 1]
    (line,) = started.errors()
    assert "data.jsonl:25" in line


def test_a_logger_that_is_not_installed(inputs, part, tmp_path, monkeypatch):
    """It is refused before a model is loaded and before an earlier run is overwritten."""
    shutil.copytree(part, tmp_path / "run")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "trackio" else find_spec(name, *a)
    )
    runs.refused(inputs, tmp_path / "run", "loggers: trackio needs the package", loggers=["trackio"], overwrite=True)


def test_nothing_to_train(inputs, tmp_path):
    with pytest.raises(AccessoryError, match="nothing would be trained"):
        runs.finetune(inputs, tmp_path / "run", llama_type="mixtral_peft", norm_tuning=False)
