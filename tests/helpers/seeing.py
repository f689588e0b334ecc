"""Whole folders of small models with images: weights of a text model, random projections and random encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from accessory.checkpoint.lazy import Constant
from accessory.checkpoint.names import image_shapes
from accessory.checkpoint.save import write_checkpoint
from accessory.config import ModelArgs
from accessory.vision_config import VisionArgs
from helpers import checkpoints as make
from helpers.sizes import SPEAKING
from helpers.vision import random_tower, tiny_clip

ARGS = SPEAKING.replace(max_seq_len=256)


def seeing_tensors(args: ModelArgs, views: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """All tensors of such a model in fp32, under canonical names; image encoders under the names of our modules."""
    generator = torch.Generator().manual_seed(seed + 1)
    assert args.vision is not None
    tensors = make.random_tensors(args, dtype=torch.float32, seed=seed)
    for name, shape in image_shapes(args).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * noise if name.endswith(".1.weight") else 0.2 * noise
    for name, tensor in random_tower(args.vision, views, seed).state_dict().items():
        tensors["vision." + name.removeprefix("encoders.")] = tensor
    return tensors


def write_seeing(
    folder: Path,
    args: ModelArgs = ARGS,
    *,
    vision: VisionArgs | None = None,
    views: int = 1,
    to: Any = "sparse",
    shards: int = 1,
    tokenizer: Path | None = None,
) -> Path:
    """Writes a folder of the accessory layout, `…_ens` or `…_ens5`; its tokenizer is Mixtral's by default."""
    from accessory.data.tokenizer import MIXTRAL_TOKENIZER

    args = args.replace(vision=vision or args.vision or tiny_clip())
    tensors = {name: Constant(tensor) for name, tensor in seeing_tensors(args, views).items()}
    resource = folder.parent / "tokenizer.model"
    if tokenizer is None:
        resource.write_bytes(Path(MIXTRAL_TOKENIZER).read_bytes())
    write_checkpoint(
        folder,
        tensors,
        args,
        to=to,
        shards=shards,
        resources=[tokenizer or resource],
        image_views=views,
        progress=False,
    )
    assert json.loads((folder / "meta.json").read_text())["llama_type"].endswith("ens" if views == 1 else "ens5")
    return folder
