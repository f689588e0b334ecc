"""Checks the prompts and examples that `MetaModel` and `Scorer` get: texts or token ids, some with an image.

Legend: 3 colours, P height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from accessory.data.image_tokens import remove_tag, remove_tags
from accessory.errors import InputError

if TYPE_CHECKING:
    from accessory.model.image_processor import Image, ImageProcessor, Images

Prompt = str | Sequence[int]
Pixels = list[Tensor | None]  # (3, P, P) fp32 for each prompt, None for one without an image


def count_prompts(prompts: Sequence[Prompt]) -> int:
    """The number of prompts. Raises InputError for one string instead of a list, and for an empty list."""
    if isinstance(prompts, str):
        raise InputError("prompts: got one string, but a list of prompts is needed; write [prompt]")
    if len(prompts) == 0:
        raise InputError("prompts: got an empty list, but at least one is needed")
    return len(prompts)


def open_images(
    image_processor: ImageProcessor | None, prompts: Sequence[Prompt], images: Images, of: str
) -> tuple[Sequence[Prompt], Pixels]:
    """The prompts without image tags, and the pixels of their images.

    image_processor: None for a text-only model, whose prompts keep their tags. of: how messages call a prompt. Raises
    InputError for an image that cannot be used, and for a prompt whose image is missing.
    """
    none: Pixels = [None] * len(prompts)
    if image_processor is None and images is not None:
        raise InputError("images: this model is text only; one that sees is loaded with with_visual=True")
    if image_processor is None:
        return prompts, none
    pixels = none if images is None else image_processor.open_all(images, len(prompts), of)
    return remove_tags(prompts, pixels, of), pixels


def open_prompt(
    image_processor: ImageProcessor | None, prompt: Prompt, image: Image | None, name: str
) -> tuple[Prompt, Tensor | None]:
    """As `open_images`, for one prompt, which messages call `name`."""
    if image_processor is None:
        if image is not None:
            raise InputError(f"{name}: has an image, but this model is text only; load it with with_visual=True")
        return prompt, None
    pixels = None if image is None else image_processor.open(image, f"{name}: image")
    return remove_tag(prompt, pixels, name), pixels


def image_token_counts(image_processor: ImageProcessor | None, pixels: Pixels) -> list[int]:
    """The number of image tokens of each prompt's image; 0 for a prompt without an image."""
    return [0 if image_processor is None or p is None else image_processor.image_tokens for p in pixels]
