"""Vision towers loaded from a checkpoint's tensors and from separately published weights."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.vision import CLIP, CONVNEXT, DINOV2, QFORMER, random_pixels, random_tower, tiny_clip, tiny_sphinx
from safetensors.torch import save_file

from accessory.checkpoint.files import read_file
from accessory.checkpoint.lazy import Computed, Constant, Lazy
from accessory.checkpoint.vision import load_tower
from accessory.checkpoint.vision_names import destinations
from accessory.errors import CheckpointError
from accessory.nn.vision import VisionTower
from accessory.vision_config import EncoderArgs, VisionArgs


def tensors_of(tower: VisionTower) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in destinations(tower).items()}


def lazily(tensors: dict[str, torch.Tensor]) -> dict[str, Lazy]:
    return {name: Constant(tensor) for name, tensor in tensors.items()}


def within(tower: VisionTower, name: str) -> dict[str, torch.Tensor]:
    prefix = f"vision.{name}."
    return {n.removeprefix(prefix): t for n, t in tensors_of(tower).items() if n.startswith(prefix)}


def same(loaded: VisionTower, tower: VisionTower) -> None:
    pixels = random_pixels(tower.args, 1, tower.views)
    ours, theirs = loaded.encode(pixels), tower.encode(pixels)
    assert torch.equal(ours.visual_VTC, theirs.visual_VTC)
    assert (ours.query_VQC is None) == (theirs.query_VQC is None)
    if ours.query_VQC is not None:
        assert torch.equal(ours.query_VQC, theirs.query_VQC)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("views", [1, 5])
def test_a_tower_comes_back_from_its_tensors(tmp_path, views, dtype):
    tower = random_tower(views=views)
    save_file(tensors_of(tower) | {"layers.0.ffn_norm.weight": torch.ones(3)}, tmp_path / "some.safetensors")
    loaded = load_tower(tower.args, views, read_file(tmp_path / "some.safetensors"), dtype=dtype, cache_bytes=5)
    assert loaded.feature_cache.limit == 5
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    same(loaded, tower.to(dtype))


def test_nothing_is_read_before_all_of_it_is_known_to_be_there():
    def read() -> torch.Tensor:
        raise AssertionError("read too early")

    tower = random_tower(tiny_clip())
    tensors: dict[str, Lazy] = {n: Computed(tuple(t.shape), t.dtype, read) for n, t in tensors_of(tower).items()}
    tensors.popitem()
    with pytest.raises(CheckpointError, match=r"encoder clip .*1 tensors missing"):
        load_tower(tower.args, 1, tensors)


def test_each_encoder_comes_from_the_checkpoint_or_from_its_own_path(tmp_path):
    tower = random_tower()
    for name in ("clip", "dinov2"):
        (tmp_path / name).mkdir()
        save_file(within(tower, name), tmp_path / name / "model.safetensors")
    args = VisionArgs(
        encoders=(
            replace(CLIP, path=str(tmp_path / "clip")),
            replace(CONVNEXT, path=str(tmp_path / "not there")),  # the checkpoint's tensors come first
            replace(DINOV2, path=str(tmp_path / "dinov2" / "model.safetensors")),
        ),
        query=QFORMER,
    )
    tensors = {n: t for n, t in tensors_of(tower).items() if n.split(".")[1] in ("convnext", "qformer")}
    same(load_tower(args, 1, lazily(tensors), dtype=torch.float32), tower)


def saved_by_transformers(encoder: EncoderArgs, folder: Path, whole: bool) -> VisionTower:
    """Calls save_pretrained on the encoder's class, or on the larger model it is part of; returns the same tower."""
    import transformers as tf

    args = VisionArgs(encoders=(encoder,)) if encoder.kind != "blip2" else VisionArgs(encoders=(CLIP,), query=encoder)
    tower = random_tower(args)
    state = tower.encoders[encoder.name].state_dict()
    tiny_text = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    if encoder.kind == "clip" and whole:
        text = tiny_text | {"num_attention_heads": 2, "eos_token_id": 2}
        model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=encoder.config, projection_dim=8))
        model.vision_model.load_state_dict(state)
    elif encoder.kind == "blip2":
        text = {"vocab_size": 9, "hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = tf.Blip2Config(
            vision_config=encoder.config["vision"],
            qformer_config=encoder.config["qformer"],
            text_config=tf.OPTConfig(**text, word_embed_proj_dim=8).to_dict(),
            num_query_tokens=3,
        )
        model = tf.Blip2Model(config)
        model.load_state_dict(state, strict=False)
    else:
        names = {"clip": "CLIPVision", "convnext": "ConvNext", "dinov2": "Dinov2"}
        config = getattr(tf, names[encoder.kind] + "Config")
        values = {k: v for k, v in encoder.config.items() if k not in ("norm_eps", "interpolate_offset")}
        if whole:
            model = getattr(tf, names[encoder.kind] + "ForImageClassification")(config(**values, num_labels=3))
            getattr(model, encoder.kind).load_state_dict(state, strict=False)
        else:
            model = getattr(tf, names[encoder.kind] + "Model")(config(**values))
            model.load_state_dict(state, strict=False)
    model.save_pretrained(folder)
    return tower


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "whole"])
@pytest.mark.parametrize("encoder", [CLIP, CONVNEXT, DINOV2, QFORMER], ids=lambda e: e.kind)
def test_folders_that_transformers_writes_load(tmp_path, encoder, whole):
    tower = saved_by_transformers(encoder, tmp_path, whole)
    with_path = replace(encoder, path=str(tmp_path))
    args = replace(tower.args, query=with_path) if encoder.kind == "blip2" else VisionArgs(encoders=(with_path,))
    others = {n: t for n, t in tensors_of(tower).items() if n.split(".")[1] != encoder.name}
    same(load_tower(args, 1, lazily(others), dtype=torch.float32), tower)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "dinov2_vitg14_pretrain.pth", "anything.pt"])
def test_pickles_load_whatever_they_are_called(tmp_path, name):
    tower = random_tower(tiny_clip())
    torch.save(within(tower, "clip"), tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    for path in (tmp_path, tmp_path / name):
        args = VisionArgs(encoders=(replace(CLIP, path=str(path)),))
        same(load_tower(args, 1, {}, dtype=torch.float32), tower)


def test_weights_in_several_files_load(tmp_path):
    tower = random_tower(tiny_clip())
    state = sorted(within(tower, "clip").items())
    files = {"model-00001-of-00002.safetensors": dict(state[:9]), "model-00002-of-00002.safetensors": dict(state[9:])}
    for name, part in files.items():
        save_file(part, tmp_path / name)
    index = {"weight_map": {tensor: name for name, part in files.items() for tensor in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    args = VisionArgs(encoders=(replace(CLIP, path=str(tmp_path)),))
    same(load_tower(args, 1, {}, dtype=torch.float32), tower)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"encoder clip: .*model-00002-of-00002\.safetensors"):
        load_tower(args, 1, {})


def fails(args: VisionArgs, tensors: dict[str, torch.Tensor], *wanted: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        load_tower(args, 1, lazily(tensors))
    message = str(raised.value)
    assert "\n" not in message
    for text in wanted:
        assert text in message


def test_an_encoder_whose_weights_are_nowhere_is_named():
    fails(tiny_sphinx(), {}, "no weights of encoder clip, convnext, dinov2, qformer", "hf://", "path")
    tensors = tensors_of(random_tower())
    some = {n: t for n, t in tensors.items() if not n.startswith("vision.dinov2.")}
    fails(tiny_sphinx(), some, "no weights of encoder dinov2: ")


def test_what_is_wrong_at_a_path_names_the_encoder_and_the_path(tmp_path):
    args = VisionArgs(encoders=(replace(CLIP, path=str(tmp_path)),))
    fails(args, {}, "encoder clip: ", str(tmp_path), "no checkpoint among the files of this folder; it has none")
    fails(VisionArgs(encoders=(replace(CLIP, path=str(tmp_path / "no")),)), {}, "encoder clip: ", "no such file")
    state = within(random_tower(tiny_clip()), "clip")
    save_file(state | {"encoder.layers.7.mlp.fc1.bias": torch.ones(64)}, tmp_path / "model.safetensors")
    fails(args, {}, "encoder clip", "1 tensors unknown: encoder.layers.7.mlp.fc1.bias", str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"<html>not found</html>")
    fails(args, {}, "encoder clip", "a web page, not a checkpoint")


def test_weights_of_another_size_are_refused():
    tensors = tensors_of(random_tower(tiny_clip()))
    wider = replace(CLIP, config=CLIP.config | {"intermediate_size": 65})
    fails(VisionArgs(encoders=(wider,)), tensors, "mlp.fc1.bias (64,) instead of (65,)", "and 1 more")


def test_a_tower_is_filled_without_holding_anything_twice():
    """Tensors are read one at a time: each once, after the one before it is in its place."""
    tower = random_tower(tiny_clip())
    asked: list[str] = []

    def lazy(name: str, tensor: torch.Tensor) -> Lazy:
        def read() -> torch.Tensor:
            asked.append(name)
            return tensor

        return Computed(tuple(tensor.shape), tensor.dtype, read)

    tensors = {n: lazy(n, t) for n, t in tensors_of(tower).items()}
    load_tower(tower.args, 1, tensors)
    assert sorted(asked) == sorted(tensors)
    assert not [n for n in asked if re.search("position_ids", n)]
