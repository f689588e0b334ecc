"""Turns images into the pixels that image encoders take: `ImageProcessor`.

Legend: 3 colours, P height and width in pixels.
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
from accessory.vision_config import VisionArgs

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
else:
    Picture = Any

Image = str | Path | Picture | Tensor
Images = Tensor | Sequence[Image | None] | None


class ImageProcessor:
    """What turns an image into the pixels that the encoders of `args` take, in `views` views."""

    def __init__(self, args: VisionArgs, views: int, transform: str = "padded_resize") -> None:
        self.pixels = args.pixels(views)  # width and height
        self.image_tokens = args.image_tokens(views)
        self._transform = get_transform(transform, self.pixels)

    def open(self, image: Image, name: str = "image") -> Tensor:
        """The pixels (3, P, P) of an image, fp32 on the CPU. A tensor already has pixels, so it is only checked.

        name: how messages call the image. InputError where the image cannot be used.
        """
        P = self.pixels
        if isinstance(image, Tensor):
            image = image[0] if image.dim() == 4 and len(image) == 1 else image  # the original passes a batch of one
            if tuple(image.shape) != (3, P, P):
                raise InputError(f"{name}: got a tensor of {tuple(image.shape)}, but pixels are (3, {P}, {P})")
            return image.detach().to("cpu", torch.float32)
        return self._transform(open_image(image))

    def open_all(self, images: Images, count: int, of: str = "prompt") -> list[Tensor | None]:
        """The pixels of each prompt's image, None for a prompt without one. InputError unless there are `count` images.

        of: how messages call a prompt.
        """
        if isinstance(images, str | Path) or not isinstance(images, Tensor | Sequence):
            raise InputError(f"images: got {images!r:.60}, but it must be a list, an image or None for each {of}")
        if len(images) != count:
            raise InputError(f"images: got {len(images)} for {count} {of}s; give one each, None where there is none")
        return [None if i is None else self.open(i, f"images[{n}]") for n, i in enumerate(images)]
