"""How configurations describe a model's image encoders."""

import json

import pytest

from accessory.config import ModelArgs
from accessory.errors import ConfigError
from accessory.vision_config import SPHINX, VISION_PRESETS, VisionArgs


def test_sphinx_by_hand():
    """Three encoders give 257 tokens, and their channels add up to 5632. Then 32 queries, a start and an end token."""
    assert [e.channels for e in SPHINX.all] == [1024, 3072, 1536, 768]
    assert [e.tokens for e in SPHINX.all] == [257, 257, 257, 32]
    assert SPHINX.channels == 5632
    assert (SPHINX.image_tokens(1), SPHINX.image_tokens(5)) == (1 + 32 + 257 + 1, 5 * 291)
    assert (SPHINX.pixels(1), SPHINX.pixels(5)) == (512, 1024)
    clip, _, dinov2, _ = SPHINX.all
    assert clip.normalisation == (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    )
    assert dinov2.normalisation == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("name", VISION_PRESETS)
def test_a_preset_survives_its_config_json(name):
    args = ModelArgs(vision=name)
    again = ModelArgs.from_dicts(json.loads(json.dumps(args.to_dict())))
    assert again.vision == args.vision == VISION_PRESETS[name]


def test_text_models_say_nothing_of_it():
    assert "vision" not in ModelArgs().to_dict()
    assert ModelArgs().sees_with is SPHINX


def test_published_encoders_have_addresses():
    args = ModelArgs(load_pretrained_visual_encoder=True)
    assert [e.path.startswith("hf://") for e in args.sees_with.all] == [True] * 4
    own = SPHINX.to_dict()
    own["encoders"][0]["path"] = "my/clip"
    paths = [e.path for e in args.replace(vision=own).sees_with.all]
    assert paths[0] == "my/clip"
    assert paths[1].startswith("hf://laion/")
    small = args.replace(vision="small")  # no published weights are known for its encoder
    assert small.sees_with.encoders[0].path is None


CLIP = {"name": "clip", "kind": "clip", "size": 28, "config": {"hidden_size": 8, "patch_size": 14}}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("large", r"vision: preset: got 'large', but it must be one of sphinx, small"),
        ([], r"vision: got \[\], but it must be a preset's name or an object"),
        ({"encoders": []}, r"vision: encoders: got \(\), but it must be at least one"),
        ({"encoder": [CLIP]}, r"vision: unknown key 'encoder'; known are encoders, query"),
        ({"encoders": ["clip"]}, r"each must be an object with name, kind and size"),
        ({"encoders": [{"name": "a", "kind": "clip"}]}, r"size is missing"),
        ({"encoders": [CLIP | {"width": 3}]}, r"unknown key 'width'"),
        ({"encoders": [CLIP | {"kind": "vit"}]}, r"kind: got 'vit', but it must be one of clip, convnext"),
        ({"encoders": [CLIP | {"size": 30}]}, r"size: got 30, but it must be a multiple of 14 pixels"),
        ({"encoders": [CLIP | {"config": {"patch_size": 14}}, CLIP | {"name": "b"}]}, r"config.hidden_size is missing"),
        ({"encoders": [CLIP, CLIP]}, r"encoders: got \['clip', 'clip'\], but it must be of different names"),
        ({"encoders": [CLIP, CLIP | {"name": "b", "size": 42}]}, r"\{'clip': 5, 'b': 10\}, but .* as many tokens each"),
        ({"encoders": [CLIP], "query": CLIP | {"name": "q"}}, r"query: got 'clip', but it must be a blip2"),
    ],
)
def test_what_is_wrong_is_one_line(value, said):
    with pytest.raises(ConfigError, match=said) as caught:
        _ = VisionArgs.parse(value).channels
    assert "\n" not in str(caught.value)


def test_trainable_mode_is_checked():
    with pytest.raises(ConfigError, match="trainable_mode: got 'mm_stage3', but it must be one of sg, mm_stage1"):
        ModelArgs(trainable_mode="mm_stage3")
