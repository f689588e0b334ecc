"""`accessory convert`: read a checkpoint of any layout; write it as base, sparse, hf, torrent or GGUF."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from accessory.checkpoint.atomic import check_destination, refuse_overlap
from accessory.checkpoint.folder import open_checkpoint
from accessory.checkpoint.save import write_checkpoint
from accessory.checkpoint.writers import Target
from accessory.convert import gguf_tokenizer
from accessory.convert.gguf import GGUFType, check_gguf_destination, write_gguf
from accessory.errors import ConfigError

log = logging.getLogger(__name__)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: Target | Literal["gguf"],
    type: GGUFType | None = None,
    shards: int | None = None,
    dtype: str | torch.dtype | None = None,
    safetensors: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = True,
    config_files: Sequence[str | Path] = (),
) -> None:
    """Write the checkpoint in `src` (a folder, GGUF file or hf:// address of any layout) to `dst`.

    Options are those of `write_checkpoint` or, to "gguf", of `write_gguf`: `type` instead of `dtype`. `dst` appears
    whole or not at all; `src` is never changed. A quantised `src` is written dequantised, but not to "gguf". Raises
    CheckpointError and ConfigError as reading and writing do, and CheckpointError if `dst` is `src` or contains it.
    """
    _check_options(to, type, {"shards": shards, "dtype": dtype, "safetensors": safetensors or None})
    if to == "gguf":
        check_gguf_destination(dst, type, overwrite, [src])
    else:
        check_destination(dst, overwrite, [src])
    source = open_checkpoint(src, config_files, allow_gguf=True)
    refuse_overlap(source.path, Path(dst))
    log.info("%s (%s, %.2f GB) → %s (%s)", source.path, source.layout, source.nbytes / 1e9, dst, to)
    with tempfile.TemporaryDirectory(prefix="accessory-") as scratch:
        folder, resources = source.path, source.resources
        if source.gguf is not None:
            folder = Path(scratch)
            resources = gguf_tokenizer.write(source.gguf.metadata, folder, source.path)
        if to == "gguf":
            write_gguf(dst, source, folder, type=type, overwrite=overwrite, verify=verify, progress=progress)
            return
        source.warn_of_dequantizing()
        write_checkpoint(
            dst,
            source.tensors,
            source.args,
            to=to,
            shards=shards,
            dtype=dtype,
            safetensors=safetensors,
            resources=resources,
            overwrite=overwrite,
            verify=verify,
            progress=progress,
            image_views=source.llama_type.image_views,
        )


def _check_options(to: str, type: str | None, others: Mapping[str, object]) -> None:
    """Raise ConfigError for an option that the layout does not have."""
    if to != "gguf" and type is not None:
        raise ConfigError(f"type: got {type!r}, but only gguf has types; leave it out, or write to gguf")
    given = next((name for name, value in others.items() if value is not None), None)
    if to == "gguf" and given is not None:
        raise ConfigError(f"{given}: does not apply to gguf, which is one file; its numbers are chosen by type")
