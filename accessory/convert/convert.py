"""`accessory convert`: read a checkpoint of any layout; write it as base, sparse, hf or torrent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from accessory.checkpoint.atomic import check_destination, refuse_overlap
from accessory.checkpoint.folder import open_checkpoint
from accessory.checkpoint.save import write_checkpoint
from accessory.checkpoint.writers import Target

log = logging.getLogger(__name__)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: Target,
    shards: int | None = None,
    dtype: str | torch.dtype | None = None,
    safetensors: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = True,
    config_files: Sequence[str | Path] = (),
) -> None:
    """Write the checkpoint in `src` (a folder or hf:// address of any layout) to `dst`.

    Options are those of `write_checkpoint`. `dst` appears whole or not at all; `src` is never changed. A quantised
    `src` is written dequantised. Raises CheckpointError and ConfigError as reading and writing do, and CheckpointError
    if `dst` is `src` or contains it.
    """
    check_destination(dst, overwrite, [src])
    source = open_checkpoint(src, config_files)
    refuse_overlap(source.path, Path(dst))
    log.info("%s (%s, %.2f GB) → %s (%s)", source.path, source.layout, source.nbytes / 1e9, dst, to)
    source.warn_of_dequantizing()
    write_checkpoint(
        dst,
        source.tensors,
        source.args,
        to=to,
        shards=shards,
        dtype=dtype,
        safetensors=safetensors,
        resources=source.resources,
        overwrite=overwrite,
        verify=verify,
        progress=progress,
        image_views=source.llama_type.image_views,
    )
