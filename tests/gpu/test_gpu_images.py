"""On a GPU: image encoders as CUDA graphs give what they give without, and each image keeps features of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.seeing import write_seeing
from helpers.vision import random_pixels, random_tower, tiny_sphinx
from PIL import Image

from accessory.model.meta import MetaModel
from accessory.vision_config import VIEWS_AT_ONCE, VISION_PRESETS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def towers(vision, views, dtype):
    """A plain one, and one with graphs; both run the encoders anew for each image."""
    plain, graphed = (random_tower(vision, views, dtype=dtype, cache_bytes=0).cuda() for _ in range(2))
    graphed.graphed = True
    return plain, graphed


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        if ours is not None or theirs is not None:
            assert theirs.float().std() > 0.05
            # The same kernels run, unless a library chooses another algorithm.
            near = {"rtol": 2e-2, "atol": 2e-2} if ours.dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(ours, theirs, **near)


@pytest.mark.parametrize("vision", [tiny_sphinx(), VISION_PRESETS["small"]], ids=["sphinx", "small"])
@pytest.mark.parametrize("views", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_replayed_features_are_the_plain_ones(vision, views, dtype):
    plain, graphed = towers(vision, views, dtype)
    pixels = random_pixels(vision, 4, views)
    kept = [graphed.encode(image[None]) for image in pixels]
    assert len(graphed._graphs) == 1
    for image, features in zip(pixels, kept, strict=True):  # after all have been encoded
        assert_same(features, plain.encode(image[None]))
    assert len({features.visual_VTC.data_ptr() for features in kept}) == 4
    again = graphed.encode(pixels[:1].cuda())  # pixels of the card
    assert len(graphed._graphs) == 1
    assert torch.equal(again.visual_VTC, kept[0].visual_VTC)
    many = random_pixels(vision, VIEWS_AT_ONCE // views + 1, views)
    assert_same(graphed.encode(many), plain.encode(many))


def test_ranks_parts_and_other_weights_have_graphs_of_their_own():
    plain, graphed = towers(tiny_sphinx(), 5, torch.float32)
    pixels = random_pixels(plain.args, 1, 5)
    for first, count in ((0, 3), (3, 2), (0, 3)):
        assert_same(graphed.run(pixels, first, count), plain.run(pixels, first, count))
    assert len(graphed._graphs) == 2
    other = random_tower(seed=1, views=5, cache_bytes=0).cuda()
    graphed.load_state_dict(other.state_dict())
    assert_same(graphed.encode(pixels), other.encode(pixels))
    found, expected = graphed.bfloat16().encode(pixels).visual_VTC, other.bfloat16().encode(pixels).visual_VTC
    assert found.dtype == torch.bfloat16
    assert (found - expected).float().norm() <= 1e-2 * expected.float().norm()


def test_nothing_waits_for_the_card():
    _, graphed = towers(tiny_sphinx(), 1, torch.bfloat16)
    pixels = random_pixels(graphed.args)
    graphed.run(pixels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed.run(pixels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("views", [1, 5])
def test_a_model_answers_about_images_as_without_graphs(tmp_path, views):
    """Images of several requests, interleaved; prompts longer than a step, so that embeddings wait for their chunk."""
    write_seeing(tmp_path / "model", vision=tiny_sphinx(), views=views)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)) for _ in range(3)]
    found = []
    for graphed in (False, True):
        how = {"with_visual": True, "dtype": "fp32", "device": "cuda", "max_seq_len": 256}
        model = MetaModel.from_pretrained(tmp_path / "model", **how)
        assert model.tower.graphed
        model.tower.graphed = graphed
        model.engine().scheduler.budget = 20
        prompts = ["What is it?", "And this?", "What else?"]
        found.append(model.generate(prompts, images, max_gen_len=12))
        assert (model.tower._graphs is not None) == graphed
    assert found[0] == found[1]
