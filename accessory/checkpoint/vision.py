"""Load image encoders from a checkpoint's tensors, or from the paths in their configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.files import read_file
from accessory.checkpoint.hub import resolve
from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.model_files import RESOURCES, Wanted, files_to_load
from accessory.checkpoint.names import is_encoder_tensor
from accessory.checkpoint.vision_names import canonical, canonical_of, destinations, parts_of
from accessory.config import ModelArgs, read_json
from accessory.errors import AccessoryError, CheckpointError
from accessory.nn.vision import VisionTower
from accessory.progress import progress_bar
from accessory.vision_config import CACHE_BYTES, EncoderArgs, VisionArgs


def load_tower(
    args: VisionArgs,
    views: int,
    tensors: Mapping[str, Lazy],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = False,
    cache_bytes: int = CACHE_BYTES,
) -> VisionTower:
    """Load the encoders of `args` onto `device` in `dtype`.

    An encoder is loaded from `tensors` if they hold any part of it, otherwise from its `path`. `tensors` are those of a
    checkpoint, with names in any known spelling but without `llma.` in front; tensors that belong to no encoder are
    ignored. Values are copied and converted block by block, so that no encoder is in memory twice. Raises
    CheckpointError naming the encoder whose weights are incomplete, misshapen or not found.
    """
    with torch.device("meta"):
        tower = VisionTower(args, views, cache_bytes=cache_bytes).to(dtype)
    found = _find(tower, tensors, progress)
    tower.to_empty(device=device)
    fill(destinations(tower), found, progress=progress)
    return tower


def encoder_tensors(args: VisionArgs, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """All tensors that `load_tower` would load, from the same sources, under our names."""
    with torch.device("meta"):
        tower = VisionTower(args, 1)
    return _find(tower, tensors, progress=False)


def with_encoders(tensors: Mapping[str, Lazy], args: ModelArgs) -> dict[str, Lazy]:
    """Add the encoders' tensors to those of a model that takes images but has no encoders; leave other models alone.

    The encoders come from the paths in the configuration. A folder written from the result needs no other files.
    """
    if "start_img" not in tensors or any(map(is_encoder_tensor, tensors)):
        return dict(tensors)
    return {**tensors, **encoder_tensors(args.sees_with, {})}


def _find(tower: VisionTower, tensors: Mapping[str, Lazy], progress: bool) -> dict[str, Lazy]:
    args = tower.args
    shapes = {name: tuple(place.shape) for name, place in destinations(tower).items()}
    found = canonical(tensors, args, shapes)
    lacking = [e for e in args.all if not any(name.startswith(f"vision.{e.name}.") for name in found)]
    nowhere = [e.name for e in lacking if e.path is None]
    if nowhere:
        raise CheckpointError(
            f"vision: no weights of encoder {', '.join(nowhere)}: the checkpoint holds none, and its path is not set; "
            "name a folder or an hf:// address as its path in the configuration's vision"
        )
    for encoder in lacking:
        found.update(_from_path(encoder, shapes, progress))
    return found


def fill(places: Mapping[str, Tensor], tensors: Mapping[str, Lazy], *, progress: bool = False) -> None:
    """Copy every tensor to its place, several at a time."""
    total = sum(place.nbytes for place in places.values())

    def copy(name: str) -> int:
        tensors[name].copy_to(places[name])
        return places[name].nbytes

    shown = progress_bar(total, "loading the image encoders", progress)
    with shown, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for nbytes in pool.map(copy, places):
                shown.update(nbytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for device in {place.device for place in places.values() if place.is_cuda}:
        torch.cuda.synchronize(device)


def _from_path(encoder: EncoderArgs, shapes: Mapping[str, tuple[int, ...]], progress: bool) -> dict[str, Lazy]:
    assert encoder.path is not None  # `_find` has checked this

    def wanted(name: str) -> bool:
        return bool(parts_of(encoder.kind, name))

    try:
        place = resolve(encoder.path, progress=progress, wanted=wanted)
        return canonical_of(encoder, _read(place, wanted), shapes)
    except AccessoryError as error:
        named = str(error) if str(error).startswith("vision: encoder") else f"vision: encoder {encoder.name}: {error}"
        raise CheckpointError(named if encoder.path in named else f"{named} (in {encoder.path})") from error


def _read(place: Path, wanted: Wanted) -> dict[str, Lazy]:
    """The tensors of a file, or of a folder that holds one model in any known form."""
    if not place.is_dir():
        return read_file(place)
    names = [path.name for path in place.iterdir() if path.is_file()]
    chosen = files_to_load(names, lambda name: read_json(place / name), str(place), wanted=wanted)
    tensors: dict[str, Lazy] = {}
    for name in chosen:
        if name not in RESOURCES and not name.endswith(".json"):
            tensors |= read_file(place / name)
    return tensors
