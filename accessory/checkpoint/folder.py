"""A checkpoint folder of any layout, opened: its configuration, and its tensors under canonical names, lazily."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from accessory.checkpoint.lazy import Lazy
from accessory.config import LlamaType, ModelArgs

Layout = Literal["torrent", "official", "hf", "base", "sparse"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened folder. `tensors` maps canonical names to whole, unsharded lazy tensors (q and k rows interleaved)."""

    path: Path
    layout: Layout
    args: ModelArgs
    llama_type: LlamaType  # what meta.json says; otherwise the layout's implementation, sparse for foreign layouts
    tensors: dict[str, Lazy]
    files: list[Path]  # that hold tensors
    resources: list[Path] = field(default_factory=list)  # tokenizer files and the like
    shards: int = 1  # model-parallel shards; 1 for layouts that have none
    partial: bool = False  # a save of the trained tensors only

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most bytes."""
        count: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            count[tensor.dtype] += tensor.nbytes
        return max(count, key=lambda dtype: count[dtype]) if count else torch.float32


def open_checkpoint(
    path: str | Path, config_files: Sequence[str | Path] = (), *, allow_partial: bool = False
) -> Checkpoint:
    """Recognise the layout of a folder and open it; no tensor data is read.

    `config_files` take precedence over the folder's own config.json and params.json, later ones over earlier ones.
    Raises CheckpointError or ConfigError naming the file, field or tensor that is missing, broken or contradictory.
    """
    raise NotImplementedError
