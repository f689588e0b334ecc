"""The planner's figures for image encoders, against the encoders themselves and measurements on a GPU."""

from dataclasses import replace

import pytest
import torch
from helpers.live import LiveBytes
from helpers.plans import BIG, TINY, finetuning, running
from helpers.vision import tiny_clip, tiny_sphinx

from accessory.adapt.peft import adapter_specs_for, add_adapters, trainable_rule
from accessory.errors import ConfigError
from accessory.nn.decoder import Decoder
from accessory.nn.vision import VisionTower
from accessory.nn.vision_encoders import build_encoder
from accessory.planner.encoders import encoders_bytes, encoding_bytes, features_bytes, parameter_count
from accessory.planner.peak import CONTEXT, estimate
from accessory.planner.setup import Inference, Setup
from accessory.planner.weights import tensor_groups, trained_parameters
from accessory.vision_config import SPHINX, VISION_PRESETS, EncoderArgs, VisionArgs

SMALL = VISION_PRESETS["small"]
# The fewest configuration keys of each kind. The other keys have transformers' defaults.
SHORT = [
    EncoderArgs(name="clip", kind="clip", size=224, config={"hidden_size": 768, "patch_size": 32}),
    EncoderArgs(name="dinov2", kind="dinov2", size=224, config={"hidden_size": 768, "patch_size": 14}),
    EncoderArgs(name="convnext", kind="convnext", size=224, config={"hidden_sizes": [96, 192, 384, 768]}),
    EncoderArgs(name="blip2", kind="blip2", size=224, config={"num_query_tokens": 32, "qformer": {"hidden_size": 768}}),
]


@pytest.mark.parametrize("encoder", [*SPHINX.all, *SMALL.all, *tiny_sphinx().all, *SHORT], ids=lambda e: e.name)
def test_numbers_are_those_of_the_network(encoder):
    with torch.device("meta"):
        module = build_encoder(encoder)
    held = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    assert parameter_count(encoder) == sum(t.numel() for t in held)


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"encoder clip: config\.hidden_size is missing"):
        parameter_count(EncoderArgs(name="clip", kind="clip", size=28, config={"patch_size": 14}))


@pytest.mark.parametrize(
    ("vision", "images", "views"),
    [
        *[(tiny_sphinx(), *much) for much in ((1, 1), (4, 1), (1, 5), (4, 5), (20, 1))],
        (SMALL, 4, 5),
        *[pytest.param(SMALL, *much, marks=pytest.mark.slow) for much in ((1, 1), (4, 1), (1, 5), (20, 1))],
        pytest.param(SPHINX, 1, 1, marks=pytest.mark.slow),
        pytest.param(SPHINX, 4, 5, marks=pytest.mark.slow),
        pytest.param(SPHINX, 20, 1, marks=pytest.mark.slow),
    ],
)
def test_encoding_takes_what_live_tensors_take(vision, images, views):
    with torch.device("meta"):
        tower = VisionTower(vision, views).to(torch.bfloat16)
        pixels = torch.empty(images, 3, tower.pixels, tower.pixels)
        with LiveBytes(tower) as live:
            features = tower.run(pixels)
    assert features.nbytes == features_bytes(vision, images * views)
    assert encoding_bytes(vision, images, views) == pytest.approx(live.peak, rel=0.03 if vision is SPHINX else 0.1)


@pytest.mark.parametrize(("images", "views", "measured"), [(1, 1, 0.13), (4, 1, 0.53), (1, 5, 0.67), (4, 5, 2.17)])
def test_encoding_as_measured(images, views, measured):
    """benchmarks/README.md, images on one 80 GB card."""
    assert encoding_bytes(SPHINX, images, views) / 1e9 == pytest.approx(measured, rel=0.03, abs=0.005)


def test_ranks_share_views():
    shared = encoding_bytes(SPHINX, 4, 1, ranks=4) - features_bytes(SPHINX, 4)
    assert shared == encoding_bytes(SPHINX, 1, 1) - features_bytes(SPHINX, 1)
    assert encoding_bytes(SPHINX, 1, 1, ranks=8) == encoding_bytes(SPHINX, 1, 1)


# --------------------------------------------------------------------------- in a whole plan


@pytest.mark.parametrize("vision", [SPHINX, tiny_clip()], ids=["sphinx", "clip alone"])
@pytest.mark.parametrize("kind", ["full", "lora", "mm_stage1"])
def test_projections_are_held_and_trained(vision, kind):
    lora = 4 if kind == "lora" else -1
    mode = {"trainable_mode": "mm_stage1"} if kind == "mm_stage1" else {}
    args = TINY.replace(vision=vision, lora_rank=lora, **mode)
    with torch.device("meta"):
        decoder = Decoder(args, "sparse", sees=True)
        add_adapters(decoder, adapter_specs_for(args))
    setup = finetuning(args, kind=kind, views=1)
    found = {g.name: g.numel for g in tensor_groups(setup) if "proj." in g.name or "_img" in g.name}
    assert found == {n: p.numel() for n, p in decoder.named_parameters() if "proj." in n or "_img" in n}
    rule = trainable_rule(args, kind == "lora")
    assert trained_parameters(setup) == sum(p.numel() for n, p in decoder.named_parameters() if rule(n))


def test_a_resident_ensemble_as_measured():
    """benchmarks/README.md: encoders 6.82 GB, with the int8 network 53.75."""
    terms = estimate(running(quant="int8", views=5)).terms
    assert (terms["image encoders"] + terms["libraries' workspace"]) / 1e9 == pytest.approx(6.82, abs=0.01)
    resident = terms["weights"] + terms["image encoders"] + terms["libraries' workspace"]
    assert resident / 1e9 == pytest.approx(53.75, abs=0.05)


def test_a_step_of_stage_1_by_hand():
    """8 rows of one image and 128 words over nf4: the largest moment is in the last layer's experts."""
    args = BIG.replace(trainable_mode="mm_stage1")
    task = {"kind": "mm_stage1", "batch_size": 8, "max_words": 291 + 128, "packing": False, "checkpointing": True}
    setup = finetuning(args, "nf4", **task, views=1)
    assert setup.images == 8
    found, T = estimate(setup), 8 * (291 + 128)
    assert found.moment == "backward of the last layer"
    stream, h = 4 * T * BIG.dim, 2 * T * BIG.dim
    kept = 32 * (stream + h)  # the inputs of the layers and of their experts
    w1_w3 = 2 * 2 * BIG.moe.num_experts * BIG.hidden_dim * BIG.dim  # dequantised
    pairs = 2 * 2 * 2 * T * (BIG.hidden_dim + BIG.dim)  # gradients of w1 x and w3 x, and two of their input
    assert found.terms["activations"] == kept + stream + w1_w3 + pairs


@pytest.mark.parametrize("views", [1, 5])
def test_images_take_at_least_the_encoders(views):
    for without, with_images in (
        (running(quant="int4"), running(quant="int4", views=views)),
        (finetuning(kind="lora"), finetuning(kind="lora", views=views)),
        (finetuning(kind="full", dp=8), finetuning(kind="full", dp=8, views=views)),
    ):
        assert estimate(with_images).total - estimate(without).total >= encoders_bytes(SPHINX)


def test_encoding_is_the_largest_moment_before_a_small_network():
    few = running(quant="int4", batch=4, context=1500, prompt=1456, views=5)
    assert estimate(few).moment == "reading the prompt"
    small = Setup(args=TINY, task=Inference(batch=4, context=1600), views=5, device="cpu")
    found = estimate(small)
    assert found.moment == "looking at images"
    assert found.terms["images"] == encoding_bytes(SPHINX, 1, 5)  # one image a step
    # On a GPU its graph keeps that memory while the network runs.
    graphed = estimate(replace(small, device="cuda"))
    assert graphed.moment == "reading the prompt"
    assert graphed.terms["the encoders' graph"] == found.terms["images"]
    assert graphed.passing > found.terms["images"]
    assert found.total > encoders_bytes(SPHINX) + found.terms["images"] + CONTEXT


def test_an_ensemble_of_one():
    alone = VisionArgs(encoders=(SPHINX.encoders[0],))
    terms = estimate(running(BIG.replace(vision=alone), views=1)).terms
    assert terms["image encoders"] == 2 * parameter_count(SPHINX.encoders[0])
