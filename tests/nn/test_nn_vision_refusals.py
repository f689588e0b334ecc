"""Configurations of image encoders and tensors of pixels that cannot be used: one line each, naming what is wrong."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers.vision import CLIP, CONVNEXT, DINOV2, QFORMER, random_tower, tiny_clip

from accessory.errors import ConfigError, InputError, MissingExtraError
from accessory.nn.vision import VisionTower
from accessory.vision_config import EncoderArgs, VisionArgs


def change(encoder: EncoderArgs, **values) -> EncoderArgs:
    config = {k: v for k, v in (encoder.config | values).items() if v is not None}
    return EncoderArgs(name=encoder.name, kind=encoder.kind, size=encoder.size, config=config)


def query_without(part: str, **values) -> VisionArgs:
    return VisionArgs(encoders=(CLIP,), query=change(QFORMER, **{part: QFORMER.config[part] | values}))


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (
            change(CLIP, hidden_akt="gelu"),
            "encoder clip: config: unknown key 'hidden_akt'; it takes those of CLIPVision",
        ),
        (change(CLIP, image_size=56), "encoder clip: config.image_size: got 56, but it must be its size, 28"),
        (change(CLIP, num_attention_heads=5), "encoder clip: config: cannot be built"),
        (change(CLIP, hidden_act="jump"), "encoder clip: config: cannot be built"),
        (change(CONVNEXT, patch_size=8), "encoder convnext: config: got depths"),
        (change(CONVNEXT, depths=[1, 1, 1]), "four stages and a patch_size of 4"),
        (change(CONVNEXT, norm_eps="small"), "encoder convnext: config.norm_eps: got 'small'"),
        (
            change(DINOV2, interpolate_offset=-1),
            "config.interpolate_offset: got -1, but it must be a number, 0 or more",
        ),
        (query_without("qformer", encoder_hidden_size=31), "encoder_hidden_size: got 31, but it must be vision.hidden"),
        (query_without("vision", image_size=14), "config.vision.image_size: got 14"),
        (query_without("vision", depth=3), "config.vision: unknown key 'depth'"),
    ],
)
def test_configurations_that_cannot_be_built_are_refused(args, wanted):
    args = args if isinstance(args, VisionArgs) else VisionArgs(encoders=(args,))
    with pytest.raises(ConfigError) as raised, torch.device("meta"):
        VisionTower(args, 1)
    assert wanted in str(raised.value)
    assert "\n" not in str(raised.value)


def test_views_and_names_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="views: got 3, but it must be one of 1, 5"):
        VisionTower(tiny_clip(), 3)
    keys = EncoderArgs(name="keys", kind="clip", size=28, config=CLIP.config)
    with pytest.raises(ConfigError, match="'keys' is taken by torch"):
        VisionTower(VisionArgs(encoders=(keys,)), 1)


@pytest.mark.parametrize(
    ("pixels", "wanted"),
    [
        (torch.zeros(1, 3, 28, 27), r"got a tensor of shape \(1, 3, 28, 27\), but it must be \(images, 3, 28, 28\)"),
        (torch.zeros(3, 28, 28), r"got a tensor of shape \(3, 28, 28\)"),
        (torch.zeros(1, 3, 28, 28, dtype=torch.uint8), "got torch.uint8"),
    ],
)
def test_tensors_that_are_no_images_are_refused(pixels, wanted):
    with pytest.raises(InputError, match=wanted):
        random_tower(tiny_clip()).encode(pixels)


def test_without_transformers_the_pip_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        MissingExtraError, match=r"encoder clip needs transformers: pip install 'mixtral-accessory\[vision\]'"
    ):
        VisionTower(tiny_clip(), 1)
