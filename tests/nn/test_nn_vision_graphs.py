"""Encoders as graphs, on a CPU with a stand-in: which calls are replayed, and that nothing in them needs the host."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.replayed import replay_on_cpu
from helpers.vision import random_pixels, random_tower, tiny_sphinx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accessory.nn import vision, vision_encoders
from accessory.nn.vision import VisionTower
from accessory.vision_config import VIEWS_A_GRAPH, VISION_PRESETS, VisionArgs


@pytest.fixture
def tower(monkeypatch):
    replay_on_cpu(monkeypatch, "accessory.nn.vision")
    return graphed(5)


def graphed(views: int) -> VisionTower:
    tower = random_tower(views=views, cache_bytes=0)
    tower.graphed = True
    return tower


def test_images_in_turn_get_features_of_their_own(tower):
    plain, pixels = random_tower(views=5, cache_bytes=0), random_pixels(tower.args, 3, 5)
    kept = [tower.encode(image[None]) for image in pixels]
    assert len(tower._graphs) == 1
    for image, features in zip(pixels, kept, strict=True):
        expected = plain.encode(image[None])
        assert torch.equal(features.visual_VTC, expected.visual_VTC)
        assert torch.equal(features.query_VQC, expected.query_VQC)
    for name in ("visual_VTC", "query_VQC"):
        assert len({getattr(features, name).data_ptr() for features in kept}) == 3
    assert tower.runs == 3


def test_a_ranks_views_are_a_graph_and_more_than_an_image_is_none(tower):
    plain, pixels = random_tower(views=5, cache_bytes=0), random_pixels(tower.args, 2, 5)
    for first, count, graphs in ((0, 3, 1), (3, 3, 2), (0, 3, 2), (6, 3, 3), (0, 10, 3)):
        found, expected = tower.run(pixels, first, count), plain.run(pixels, first, count)
        assert torch.equal(found.visual_VTC, expected.visual_VTC)
        assert len(tower._graphs) == graphs
    assert VIEWS_A_GRAPH >= 5  # an image is one


def test_graphs_are_bounded_and_gone_with_the_weights(tower, monkeypatch):
    monkeypatch.setattr(vision, "MOST_GRAPHS", 1)
    pixels = random_pixels(tower.args, 1, 5)
    plain = random_tower(views=5)
    for count in (1, 2, 1):
        assert torch.equal(tower.run(pixels, 0, count).visual_VTC, plain.run(pixels, 0, count).visual_VTC)
        assert len(tower._graphs) == 1
    twin = copy.deepcopy(tower)
    assert len(twin._graphs) == 0
    tower.to(torch.bfloat16)
    assert tower.encode(pixels).visual_VTC.dtype == torch.bfloat16
    tower.float().load_state_dict(random_tower(seed=1).state_dict())
    assert torch.equal(tower.encode(pixels).visual_VTC, random_tower(seed=1, views=5).encode(pixels).visual_VTC)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_who_does_not_ask_for_graphs_gets_none(tower, on_gpu, monkeypatch):
    monkeypatch.setattr(vision, "possible", lambda device: on_gpu)
    tower.graphed = not on_gpu
    tower.encode(random_pixels(tower.args, 1, 5))
    assert tower._graphs is None


class HostFree(TorchDispatchMode):
    """Fails where an operation asks for a value or takes a tensor of the host, which a recording cannot."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not isinstance(tensor, torch.Tensor) or tensor.is_meta, f"{func} takes a tensor of the host"
        assert torch.Tag.data_dependent_output not in func.tags, f"{func} waits for values"
        assert torch.Tag.dynamic_output_shape not in func.tags, f"{func} waits for a shape"
        return out


class NoneMadeOnTheHost(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), f"{func.__name__} copies from the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("args", [tiny_sphinx(), VISION_PRESETS["small"]], ids=["sphinx", "small"])
@pytest.mark.parametrize("views", [1, 5])
def test_no_encoder_needs_the_host(args, views):
    with torch.device("meta"):
        tower = VisionTower(args, views)
        pixels = torch.empty(1, 3, tower.pixels, tower.pixels)
    tower.run(pixels)  # what is made once
    with HostFree(), NoneMadeOnTheHost():
        assert len(tower.run(pixels).visual_VTC) == views


def test_attention_is_torchs_own_product():
    attentions = [m for m in random_tower().modules() if "Attention" in type(m).__name__ and hasattr(m, "config")]
    assert {type(m).__name__ for m in attentions} > {"CLIPAttention", "Dinov2Attention", "Blip2Attention"}
    assert {m.config._attn_implementation for m in attentions} == {"sdpa"}


@pytest.mark.parametrize("offset", [0.1, None])
def test_positions_are_resampled_once_for_each_set_of_weights(offset, monkeypatch):
    dinov2 = next(encoder for encoder in tiny_sphinx().encoders if encoder.kind == "dinov2")
    dinov2 = replace(dinov2, config={**dinov2.config, "interpolate_offset": offset})
    args = VisionArgs(encoders=(dinov2,))
    calls = []
    interpolate = vision_encoders.F.interpolate
    monkeypatch.setattr(
        "torch.nn.functional.interpolate", lambda x, *a, **kw: calls.append(x) or interpolate(x, *a, **kw)
    )
    tower = random_tower(args, cache_bytes=0)
    pixels = random_pixels(args)
    calls.clear()
    first = tower.encode(pixels)
    assert torch.equal(tower.encode(pixels).visual_VTC, first.visual_VTC)
    assert len(calls) == 1
    tower.load_state_dict(random_tower(args, seed=1).state_dict())
    assert (tower.encode(pixels).visual_VTC - first.visual_VTC).abs().max() > 0.1
    assert torch.equal(tower.encode(pixels).visual_VTC, random_tower(args, seed=1).encode(pixels).visual_VTC)
    assert torch.equal(copy.deepcopy(tower).encode(pixels).visual_VTC, tower.encode(pixels).visual_VTC)
    tower.double().encode(pixels)
