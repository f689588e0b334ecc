"""From an image of any size to the square of numbers that encoders take: `get_transform`, `ImageLoader`.

The three transforms are those of the original project. They give the same bits as torchvision's operations on Pillow's
images, without torchvision. The caller passes the random numbers in, so a crop follows from a seed and not from the
thread that makes it.

Legend: 3 colours, S pixels each way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from accessory.data.images import MAX_PIXELS, ImageSource, open_image
from accessory.errors import InputError
from accessory.vision_config import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from PIL import Image

SCALE, RATIO = (
    (0.9, 1.0),
    (3 / 4, 4 / 3),
)  # of a random crop: its share of the area, its width divided by its height
_TRIES = 10
_GREY = tuple(int(255 * c) for c in CLIP_MEAN)  # rounded down to whole numbers, as in the original
# A larger or longer image is made smaller, or cut, first: a strip of one pixel by a million would become a square of a
# million by a million. No photograph is so large or so long, and all others give the original's bits.
_LONGEST = 8192  # pixels of the longer side of an image that is padded to a square
_STRETCH = 16  # the longer side of an image whose centre is cut out, divided by the shorter one

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Transform:
    """Turns an RGB image of Pillow's into (3, S, S) fp32: CLIP's mean subtracted, divided by its standard deviation.

    `random` decides what a random crop shows: a Random, or a seed for one. Without it, every call shows another part.
    InputError for an image of another mode.
    """

    name: str
    size: int

    def __call__(self, image: Image.Image, random: Random | int | str | None = None) -> Tensor:
        if image.mode != "RGB":
            raise InputError(f"image: got one of mode {image.mode}, but it must be RGB; open_image makes it so")
        random = random if isinstance(random, Random) else Random(random)
        return normalised(TRANSFORMS[self.name](image, self.size, random))


def get_transform(transform_type: str, size: int = 224) -> Transform:
    """The transform of that name: random_resized_crop (for training), resized_center_crop, or padded_resize.

    padded_resize shows the whole image, on a grey square. Raises InputError for an unknown name or size.
    """
    if transform_type not in TRANSFORMS:
        raise InputError(f"image_transform: got {transform_type!r}, but it must be one of {', '.join(TRANSFORMS)}")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(f"size: got {size!r}, but it must be a whole number of pixels")
    return Transform(transform_type, size)


@dataclass(frozen=True)
class ImageLoader:
    """Turns a path, bytes or an image of Pillow's into (3, S, S) fp32. Raises `open_image`'s errors."""

    transform: Transform
    max_pixels: int = MAX_PIXELS

    @classmethod
    def of(cls, transform_type: str, size: int, max_pixels: int = MAX_PIXELS) -> ImageLoader:
        return cls(get_transform(transform_type, size), max_pixels)

    @property
    def size(self) -> int:
        return self.transform.size

    def __call__(self, source: ImageSource, random: Random | int | str | None = None) -> Tensor:
        return self.transform(open_image(source, max_pixels=self.max_pixels), random)

    def grey(self) -> Tensor:
        """The pixels of an image that shows nothing: CLIP's mean colour everywhere."""
        return torch.zeros(3, self.size, self.size)


def normalised(image: Image.Image) -> Tensor:
    """(3, height, width) fp32 of an RGB image: CLIP's mean subtracted, divided by its standard deviation."""
    pixels_3HW = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return pixels_3HW.sub_(mean).div_(std)


# --------------------------------------------------------------------------- the three ways


def random_crop(width: int, height: int, random: Random) -> Box:
    """A random part of 90 to 100% of the area, with sides between 3 : 4 and 4 : 3.

    Where ten tries find none that fits, it is the largest part in the middle with such sides.
    """
    for _ in range(_TRIES):
        area = width * height * random.uniform(*SCALE)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _random_resized_crop(image: Image.Image, size: int, random: Random) -> Image.Image:
    return _resized(image.crop(random_crop(*image.size, random)), size, size)


def _resized_center_crop(image: Image.Image, size: int, random: Random) -> Image.Image:
    """The shorter side becomes `size`. Of the longer one, the middle is kept."""
    image = _middle(image, *(min(side, _STRETCH * min(image.size)) for side in image.size))
    width, height = image.size
    short = min(width, height)
    image = _resized(image, size * width // short, size * height // short)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _padded_resize(image: Image.Image, size: int, random: Random) -> Image.Image:
    from PIL import Image

    longest = max(image.size)
    if longest > _LONGEST:
        image = _resized(image, *(max(1, round(side * _LONGEST / longest)) for side in image.size))
    side = max(image.size)
    if image.width != image.height:
        square = Image.new("RGB", (side, side), _GREY)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return _resized(image, size, size)


TRANSFORMS: dict[str, Callable[[Image.Image, int, Random], Image.Image]] = {
    "random_resized_crop": _random_resized_crop,
    "resized_center_crop": _resized_center_crop,
    "padded_resize": _padded_resize,
}


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    from PIL import Image

    return image.resize((width, height), Image.Resampling.BICUBIC)
