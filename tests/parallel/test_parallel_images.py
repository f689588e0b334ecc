"""Images encoded by several ranks: every rank gets the features of one process, and each view runs once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from helpers.distributed import run_ranks
from helpers.vision import random_pixels, random_tower, randomise, tiny_sphinx

from accessory.nn import vision
from accessory.nn.vision import Features, VisionTower
from accessory.parallel.images import encode_shared
from accessory.parallel.mesh import Ranks
from accessory.vision_config import EncoderArgs, VisionArgs


class Patches(torch.nn.Module):
    """A stand-in for an encoder, so that ranks need not import transformers: a convolution, then queries or patches."""

    def __init__(self, encoder: EncoderArgs) -> None:
        super().__init__()
        self.step = encoder.size // 2
        self.tokens = encoder.tokens
        self.conv = torch.nn.Conv2d(3, encoder.channels, self.step, self.step)

    def forward(self, pixels_V3SS: torch.Tensor) -> torch.Tensor:
        tokens = self.conv(pixels_V3SS).flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)[:, : self.tokens]


@contextmanager
def stand_ins() -> Iterator[None]:
    with (
        patch.object(vision, "build_encoder", Patches),
        patch.object(vision, "run_encoder", lambda kind, module, x: module(x)),
    ):
        yield


def stand_in_tower(args: VisionArgs, views: int, dtype: torch.dtype) -> VisionTower:
    tower = VisionTower(args, views, cache_bytes=2**20)
    randomise(tower)
    return tower.to(dtype)


def calls(args: VisionArgs, views: int) -> list[torch.Tensor]:
    """Pixels of four calls: one image; three images; a known and a new image; no image."""
    pixels = random_pixels(args, 5, views)
    return [pixels[:1], pixels[1:4], pixels[[1, 4]], pixels[:0]]


def shared(rank: int, world: int, views: int, dtype: torch.dtype) -> list[tuple[Features, int]]:
    import torch.distributed as dist

    args = tiny_sphinx()
    with stand_ins():
        ranks = Ranks.of(dist.group.WORLD)
        tower = stand_in_tower(args, views, dtype)
        out = []
        for pixels in calls(args, views):
            out.append((encode_shared(tower, pixels, ranks), tower.runs))
        if rank == world - 1:  # ranks may have cached different images
            alone = random_pixels(args, 1, views, seed=9)
            tower.encode(alone)
        out.append((encode_shared(tower, random_pixels(args, 1, views, seed=9), ranks), len(tower.feature_cache)))
        return out


@pytest.mark.parametrize(("world", "views"), [(2, 1), (4, 5)])
def test_shared_among_ranks_features_are_those_of_one_alone(world, views):
    args = tiny_sphinx()
    with stand_ins():
        tower = stand_in_tower(args, views, torch.float32)
        expected = [tower.encode(p) for p in [*calls(args, views), random_pixels(args, 1, views, seed=9)]]
    for results in run_ranks(shared, world, views, torch.float32):
        for (features, _), alone in zip(results, expected, strict=True):
            torch.testing.assert_close(features.visual_VTC, alone.visual_VTC, rtol=0, atol=1e-6)
            torch.testing.assert_close(features.query_VQC, alone.query_VQC, rtol=0, atol=1e-6)
        assert results[-1][1] == 6  # every rank has cached all six images, also those that another rank ran


def test_the_views_of_one_image_are_shared_among_ranks():
    # Five views on four ranks: two, two, one and none. Then three images: 15 views, at most four on a rank.
    runs = [[ran for _, ran in results[:4]] for results in run_ranks(shared, 4, 5, torch.bfloat16)]
    assert [r[0] for r in runs] == [1, 1, 1, 0]
    assert [r[1] - r[0] for r in runs] == [1, 2, 2, 1]
    assert [r[2] - r[1] for r in runs] == [1, 1, 1, 0]  # the cached image is not run again
    assert all(r[3] == r[2] for r in runs)


@pytest.mark.parametrize("ranks", [None, Ranks(group=None, rank=0, size=1)], ids=["none", "one"])
def test_one_rank_encodes_alone(ranks):
    with stand_ins():
        tower = stand_in_tower(tiny_sphinx(), 5, torch.float32)
        pixels = random_pixels(tower.args, 3, 5)
        assert torch.equal(encode_shared(tower, pixels, ranks).visual_VTC, tower.encode(pixels).visual_VTC)
        assert tower.runs == 3


def real(rank: int, world: int) -> list[Features]:
    import torch.distributed as dist

    tower = random_tower(views=5)
    pixels = random_pixels(tower.args, 4, 5)
    ranks = Ranks.of(dist.group.WORLD)
    with torch.inference_mode():
        return [encode_shared(tower, p, ranks) for p in (pixels[:1], pixels[1:], pixels)]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_the_real_encoders_shared_among_ranks(world):
    tower = random_tower(views=5)
    pixels = random_pixels(tower.args, 4, 5)
    alone = tower.encode(pixels)
    for one, three, four in run_ranks(real, world):
        for features, start, count in ((one, 0, 5), (three, 5, 15), (four, 0, 20)):
            expected = alone.narrow(start, count)
            torch.testing.assert_close(features.visual_VTC, expected.visual_VTC, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(features.query_VQC, expected.query_VQC, rtol=1e-6, atol=1e-6)
