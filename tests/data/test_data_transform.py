"""Image transforms: exact against Pillow's operations; random crops against the properties of their rule."""

import math
import random

import numpy as np
import pytest
import torch
from helpers.pictures import encoded, gradient, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from accessory.data.transform import TRANSFORMS, ImageLoader, get_transform, random_crop
from accessory.errors import InputError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = Image.Resampling.BICUBIC
sides = st.one_of(st.integers(1, 5), st.integers(1, 300))


def numbers(image):
    """The normalised values (3, height, width), fp32, of an RGB image, computed in float64."""
    values = np.asarray(image).astype(np.float64) / 255
    return torch.tensor((values - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)


def same(ours, image):
    """Equal but for fp32 rounding: the tolerance is 2e-6, and one colour step is more than 0.014."""
    return ours.dtype == torch.float32 and torch.allclose(ours, numbers(image), atol=2e-6, rtol=0)


@given(sides, sides, st.sampled_from([1, 7, 32, 224]), st.sampled_from(sorted(TRANSFORMS)))
@settings(max_examples=100, deadline=None)
def test_any_image_becomes_a_square(width, height, size, name):
    out = get_transform(name, size)(noise(width, height), 0)
    assert out.shape == (3, size, size)
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    assert out.is_contiguous()


@given(sides, sides, st.sampled_from([7, 32, 224]))
@settings(max_examples=50, deadline=None)
def test_padded_resize_is_pillows(width, height, size):
    image, side = noise(width, height), max(width, height)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    assert same(get_transform("padded_resize", size)(image), square.resize((size, size), BICUBIC))


@given(sides, sides, st.sampled_from([7, 32, 224]))
@settings(max_examples=50, deadline=None)
def test_resized_center_crop_is_pillows(width, height, size):
    width, height = min(width, 16 * height), min(height, 16 * width)
    image = noise(width, height)
    if width <= height:
        resized = image.resize((size, int(size * height / width)), BICUBIC)
    else:
        resized = image.resize((int(size * width / height), size), BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    wanted = resized.crop((left, top, left + size, top + size))
    assert same(get_transform("resized_center_crop", size)(image), wanted)


def test_the_middle_and_the_whole():
    image = gradient(300, 100)
    whole = get_transform("padded_resize", 60)(image)
    cut = get_transform("resized_center_crop", 60)(image)
    grey = numbers(Image.new("RGB", (60, 60), (122, 116, 104)))
    assert torch.allclose(whole[:, :17], grey[:, :17], atol=2e-6)
    assert torch.allclose(whole[:, -17:], grey[:, -17:], atol=2e-6)
    red = (whole[0, 30] * STD[0] + MEAN[0]) * 255
    assert red[0] < 15
    assert red[-1] > 240
    red = (cut[0, 30] * STD[0] + MEAN[0]) * 255
    assert 80 < red[0] < 90
    assert 165 < red[-1] < 175
    assert grey.abs().max() < 0.02, "the mean colour, but for whole numbers"
    assert ImageLoader.of("padded_resize", 60).grey().tolist() == torch.zeros(3, 60, 60).tolist()


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
@pytest.mark.parametrize("size", [(60_000, 1), (3, 30_000)])
def test_strips_do_not_grow_by_squares(name, size):
    """1 × 60,000 pixels would take 11 GB as a padded square, or be 2.4 million pixels long at a height of 224."""
    image = Image.new("RGB", size, (200, 10, 10))
    image.paste((10, 200, 10), (0, 0, (size[0] + 1) // 2, size[1] if size[0] > 1 else size[1] // 2))
    out = get_transform(name, 32)(image, 1)
    assert out.shape == (3, 32, 32)
    if name == "resized_center_crop":
        first, last = (out[:, 16, 0], out[:, 16, -1]) if size[0] > 1 else (out[:, 0, 16], out[:, -1, 16])
        assert first[1] > 0 > first[0], "green"
        assert last[0] > 0 > last[1], "red"


def test_large_pictures_are_padded_smaller(monkeypatch):
    monkeypatch.setattr("accessory.data.transform._LONGEST", 800)
    image = gradient(900, 300)
    ours = get_transform("padded_resize", 64)(image)
    square = Image.new("RGB", (900, 900), (122, 116, 104))
    square.paste(image, (0, 300))
    wanted = numbers(square.resize((64, 64), BICUBIC))
    assert (ours - wanted).abs().max() < 0.15  # at the edges; one colour step is 0.014
    monkeypatch.setattr("accessory.data.transform._LONGEST", 900)
    assert torch.allclose(get_transform("padded_resize", 64)(image), wanted, atol=2e-6)


# --------------------------------------------------------------------------- random crops


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 10_000))
@settings(max_examples=300, deadline=None)
def test_crops_keep_their_bounds(width, height, seed):
    left, top, right, bottom = random_crop(width, height, random.Random(seed))
    w, h = right - left, bottom - top
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if 3 / 4 <= width / height <= 4 / 3:  # the crop was found, or is the whole image
        # A side is rounded by half a pixel.
        assert (w + 0.5) * (h + 0.5) >= 0.9 * width * height
    # A random crop and the middle both keep the bounds of the ratio, but for rounding.
    assert (w + 0.5) / max(h - 0.5, 0.5) >= 3 / 4
    assert max(w - 0.5, 0.5) / (h + 0.5) <= 4 / 3 or w == 1


def test_the_middle_where_nothing_fits():
    """An image longer than 40 : 27 has no 4 : 3 crop of 90% of its area (0.9 · w · h = 4/3 · h²)."""
    for seed in range(50):
        assert random_crop(1000, 100, random.Random(seed)) == (433, 0, 566, 100)
        assert random_crop(100, 1000, random.Random(seed)) == (0, 433, 100, 566)
        assert random_crop(1, 1, random.Random(seed)) == (0, 0, 1, 1)
    boxes = {random_crop(400, 300, random.Random(seed)) for seed in range(50)}
    assert len(boxes) > 30


def test_crops_are_spread_as_the_rule_says():
    """Area is uniform in 0.9 … 1 and the logarithm of the ratio is uniform; worked out by hand for a square image.

    A crop of ratio r and area a fits into a square if a · max(r, 1/r) <= 1, so |log r| <= -log a.
    """
    chance = random.Random(0)
    found = []
    while len(found) < 4000:
        left, top, right, bottom = random_crop(10_000, 10_000, chance)
        if (right - left, bottom - top) != (10_000, 10_000):
            found.append((right - left, bottom - top, left, top))
    w, h, left, top = np.array(found, np.float64).T
    area, log_ratio = w * h / 1e8, np.log(w / h)
    assert area.min() > 0.8999
    grid = np.linspace(0.9, 1, 10_001)
    density = -np.log(grid)  # of accepted areas: the range of log r that fits
    mean = float((grid * density).sum() / density.sum())
    assert area.mean() == pytest.approx(mean, abs=0.002)
    assert abs(log_ratio.mean()) < 0.004
    assert (np.abs(log_ratio) <= -np.log(area) + 1e-3).all()
    free = w < 9900
    assert (left[free] / (10_000 - w[free])).mean() == pytest.approx(0.5, abs=0.03)
    assert (top / np.maximum(10_000 - h, 1)).mean() == pytest.approx(0.5, abs=0.05)


def test_ten_tries():
    class Never(random.Random):
        calls = 0

        def uniform(self, a, b):
            self.calls += 1
            return b

    never = Never()
    assert random_crop(100, 100, never) == (0, 0, 100, 100)
    assert never.calls == 20, "an area and a ratio a try"


@given(st.integers(0, 2**32), st.text(max_size=8))
@settings(max_examples=30, deadline=None)
def test_a_seed_decides_the_crop(seed, text):
    image, transform = noise(40, 30), get_transform("random_resized_crop", 16)
    assert torch.equal(transform(image, seed), transform(image, random.Random(seed)))
    assert torch.equal(transform(image, text), transform(image, text))
    box = random_crop(40, 30, random.Random(seed))
    assert same(transform(image, seed), image.crop(box).resize((16, 16), BICUBIC))


def test_without_a_seed_crops_differ():
    # Ten tries all fail for one crop in eight of a square (one in three of 4 : 3), which then is the whole image. The
    # other crops are random, so 32 whole images of 40 do not happen.
    image, transform = gradient(300, 300), get_transform("random_resized_crop", 16)
    assert len({transform(image).numpy().tobytes() for _ in range(40)}) > 8
    assert torch.equal(transform(image, 7), transform(image, 7))


# --------------------------------------------------------------------------- by name


def test_names_and_sizes_are_checked():
    with pytest.raises(InputError, match="image_transform: got 'crop', but it must be one of random_resized_crop, res"):
        get_transform("crop")
    for size in (0, -1, 1.5, True, "224"):
        with pytest.raises(InputError, match=f"size: got {size!r}, but it must be a whole number of pixels"):
            get_transform("padded_resize", size)
    with pytest.raises(InputError, match="image: got one of mode L, but it must be RGB; open_image makes it so"):
        get_transform("padded_resize")(Image.new("L", (4, 4)))
    assert get_transform("padded_resize")(noise(4, 4)).shape == (3, 224, 224)


def test_the_loader_opens_and_transforms(tmp_path):
    noise(30, 20).save(tmp_path / "a.png")
    load = ImageLoader.of("random_resized_crop", 16, max_pixels=600)
    wanted = get_transform("random_resized_crop", 16)(noise(30, 20), 5)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(noise(30, 20)), noise(30, 20)):
        assert torch.equal(load(source, 5), wanted)
    assert load.size == 16
    with pytest.raises(InputError, match="more than 599"):
        ImageLoader.of("padded_resize", 16, max_pixels=599)(tmp_path / "a.png")
    assert math.prod(load.grey().shape) == 3 * 16 * 16
