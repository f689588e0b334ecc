"""What a model sees with, from a path or picture to what the decoder takes: `Eyes`.

Legend: I images, P pixels each way, V views of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accessory.data.images import open_image
from accessory.data.transform import get_transform
from accessory.errors import InputError
from accessory.nn.vision import Features, VisionTower
from accessory.parallel.images import encode_shared
from accessory.parallel.mesh import Ranks

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
else:
    Picture = Any

Image = str | Path | Picture | Tensor
Images = Tensor | Sequence[Image | None] | None


class ImageProcessor:
    """A tower of encoders and the transform that makes images what it takes; `ranks` share the work."""

    def __init__(self, tower: VisionTower, transform: str = "padded_resize", ranks: Ranks | None = None) -> None:
        self.tower, self.ranks = tower, ranks
        self.image_tokens = tower.args.image_tokens(tower.views)
        self._transform = get_transform(transform, tower.pixels)

    def open(self, image: Image, name: str = "image") -> Tensor:
        """(3, P, P) fp32 pixels of an image; of pixels, themselves. InputError says what is wrong with it."""
        P = self.tower.pixels
        if isinstance(image, Tensor):
            image = image[0] if image.dim() == 4 and len(image) == 1 else image  # a batch of one, as the original's
            if tuple(image.shape) != (3, P, P):
                raise InputError(f"{name}: got a tensor of {tuple(image.shape)}, but pixels are (3, {P}, {P})")
            return image.detach().to("cpu", torch.float32)
        return self._transform(open_image(image))

    def open_all(self, images: Images, count: int, of: str = "prompt") -> list[Tensor | None]:
        """Pixels of an image for each of `count` prompts, or None; InputError where there are more or fewer."""
        if isinstance(images, str | Path) or not isinstance(images, Tensor | Sequence):
            raise InputError(f"images: got {images!r:.60}, but it must be a list, an image or None for each {of}")
        if len(images) != count:
            raise InputError(f"images: got {len(images)} for {count} {of}s; give one each, None where there is none")
        return [None if i is None else self.open(i, f"images[{n}]") for n, i in enumerate(images)]

    def features(self, pixels: Sequence[Tensor | None]) -> Features | None:
        """What the encoders see of those that are there, in order; None where none is."""
        there = [p for p in pixels if p is not None]
        return encode_shared(self.tower, torch.stack(there), self.ranks) if there else None
