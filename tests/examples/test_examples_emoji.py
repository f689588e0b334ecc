"""The emoji example: the whole demo on a tiny network, its recipes and its errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers.emoji import no_font

from accessory.config import ModelArgs
from accessory.convert.merge import merge
from accessory.model.meta import MetaModel
from accessory.nn.efficientnet import EfficientNetLite0
from accessory.train.config import FinetuneConfig
from accessory.train.run_folder import FINAL
from examples.emoji import data, run
from examples.emoji.evaluate import SIGHTS
from examples.emoji.run import Scale

pytest.importorskip("PIL", reason="pip install pillow")
from PIL import Image


@pytest.fixture
def small_scale() -> Scale:
    return dataclasses.replace(
        run.SHORT,
        size=32,
        names=True,
        recipe={**run.SHORT.recipe, "batch_size": 2},
        stages={name: {**stage, "max_steps": 2} for name, stage in run.SHORT.stages.items()},
    )


@pytest.mark.slow
def test_from_packages_to_the_table_on_a_tiny_network(
    packages: Path, small_scale: Scale, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs both stages, asks the questions and checks the files. A second run repeats no finished step."""
    from helpers.runs import write_model

    folder = packages.parent
    write_model(folder / "base")
    (folder / "weights").mkdir()
    torch.save(EfficientNetLite0().state_dict(), folder / "weights" / "model.pth")
    monkeypatch.setattr(run, "encoder_folder", lambda: folder / "weights")
    monkeypatch.setattr(data, "noto_font", no_font)
    monkeypatch.setattr(data, "SHARE", 0.25)
    told = run.emoji_demo(folder, small_scale, device="cpu", batch=4)
    home = folder / "emoji-short"
    assert json.loads((home / "results.json").read_text()) == json.loads(json.dumps(told))
    assert set(told) == {"Fluent"}
    assert told["Fluent"]["emoji"] == 9
    assert set(told["Fluent"]["accuracy"]) == set(SIGHTS)
    with Image.open(home / "fluent.png") as image:
        assert image.width > 100
    chain = [folder / "base", home / "stage1" / FINAL, home / "stage2" / FINAL]
    merge(chain, home / "model", to="base", progress=False)
    answers = []
    for paths in (chain, home / "model"):
        model = MetaModel.from_pretrained(
            paths, max_seq_len=128, with_visual=True, device="cpu", dtype=torch.float32, llama_type="mixtral_ens"
        )
        assert model.image_words == 4
        answers.append(model.compute_logits(["Its group:"], [home / "data" / "fluent" / "1f601.webp"])[0])
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
    printed = capsys.readouterr().out
    assert "27 emoji to learn from, 9 held out" in printed
    assert "one of 9 at random" in printed
    assert "Activities" in printed

    monkeypatch.setattr(run, "finetune", _never)
    assert (
        run.emoji_demo(folder, small_scale, device="cpu", batch=4)["Fluent"]["accuracy"] == told["Fluent"]["accuracy"]
    )
    assert f"{home / 'stage2'} is there already" in capsys.readouterr().out


def _never(*_: object) -> None:
    raise AssertionError("what is there is not done again")


def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run.main(["--dir", str(tmp_path / "new"), "--short"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the demo's image encoder is missing: pip install")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("scale", [run.FULL, run.SHORT])
def test_recipes_hold_what_a_finetune_takes(scale: Scale, tmp_path: Path) -> None:
    for name, changes in scale.stages.items():
        recipe = run._write_recipe(tmp_path, name, [tmp_path], tmp_path, scale, changes, "cpu")
        config = FinetuneConfig.from_yaml(recipe)
        assert config.trainable_mode == {"stage1": "mm_stage1", "stage2": "mm_stage2"}[name]
        assert config.only_save_trainable
        (vision,) = (ModelArgs.from_files(path).vision for path in config.llama_config)
        assert vision is not None
        assert vision.pixels(1) == scale.size
        assert scale.asked in scale.amount.kinds
