"""Where an image stands in a row of token ids, and the tag that speaks of it in a text.

An image takes positions of its own in the row. They hold `IMAGE_ID`, which is no tokenizer's id, and stand behind BOS,
or in front of everything where a row has no BOS. The network puts what it makes of the image there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from accessory.errors import InputError
from accessory.vision_config import IMAGE_ID

IMAGE_TAG = "<image>"
_TAG_AND_SPACE = re.compile(rf"{IMAGE_TAG}\s*")


def image_start(ids: Sequence[int], bos_id: int | None) -> int:
    """The index in `ids` at which an image's positions are inserted: 1 behind BOS, 0 without one."""
    return 1 if len(ids) and ids[0] == bos_id else 0


def insert_image_tokens(ids: Sequence[int], count: int, bos_id: int | None) -> list[int]:
    """`ids` with the `count` positions of an image in them."""
    start = image_start(ids, bos_id)
    return [*ids[:start], *[IMAGE_ID] * count, *ids[start:]]


def refuse_tag(prompt: Any, image: Any, name: str) -> None:
    """Raise InputError for a prompt, called `name`, that speaks of an image while `image` is None."""
    if image is None and isinstance(prompt, str) and IMAGE_TAG in prompt:
        raise InputError(f"{name}: speaks of an {IMAGE_TAG}, but images has none for it; give it one")


def remove_tag(prompt: Any, image: Any, name: str) -> Any:
    """A text without its tags and the white space behind each. Token ids stay as they are.

    Raises what `refuse_tag` raises.
    """
    refuse_tag(prompt, image, name)
    return _TAG_AND_SPACE.sub("", prompt) if isinstance(prompt, str) else prompt


def remove_tags(prompts: Sequence[Any], images: Sequence[Any], of: str = "prompt") -> list[Any]:
    """Each prompt as `remove_tag` gives it. of: what messages call a prompt."""
    pairs = zip(prompts, images, strict=True)
    return [remove_tag(prompt, image, f"{of}s[{n}]") for n, (prompt, image) in enumerate(pairs)]


def without_tag(text: str) -> str:
    """A message without its tag, and without white space around it, as in the original project."""
    return text.replace(IMAGE_TAG, "").strip() if IMAGE_TAG in text else text


def item_without_tags(value: Any, depth: int = 5) -> Any:
    """An item of finetuning data with every text in it, but for its image's path, as `without_tag` gives it."""
    if isinstance(value, str):
        return without_tag(value)
    if isinstance(value, list) and depth:
        return [item_without_tags(v, depth - 1) for v in value]
    if isinstance(value, Mapping) and depth:
        return {key: v if key == "image" else item_without_tags(v, depth - 1) for key, v in value.items()}
    return value
