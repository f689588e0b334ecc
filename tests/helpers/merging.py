"""Bases and adapters to merge, the merge as tests call it, and the values its results are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accessory.build.network import NetworkSpec, build
from accessory.checkpoint.chain import chained_args, open_chain
from accessory.checkpoint.folder import open_checkpoint
from accessory.config import Implementation
from accessory.convert.merge import Report, merge
from accessory.errors import CheckpointError
from helpers import checkpoints as make
from helpers.adapters import SEVEN, peft_args, random_adapter, save_adapter
from helpers.checkpoints import ARGS, Tensors
from helpers.random_models import canonical_from_hf, hf_mixtral

TENSORS = {n: t.clone() for n, t in canonical_from_hf(hf_mixtral(ARGS, std=0.1)).items()}
HALF = {name: tensor.bfloat16() for name, tensor in TENSORS.items()}
EVERYWHERE = (*SEVEN, "gate", "output")
IDS = torch.randint(ARGS.vocab_size, (2, 24), generator=torch.Generator().manual_seed(7))


def write_base(parent: Path) -> Path:
    return make.write_accessory(parent / "base", HALF, "base", world=2)


def write_exact_base(parent: Path) -> Path:
    """Writes a base of the same weights in fp32, before they were rounded."""
    return make.write_accessory(parent / "exact", TENSORS, "sparse", world=2)


def write_adapter(parent: Path) -> Path:
    return save_adapter(parent / "adapter", random_adapter(), peft_args())


def quiet_merge(*paths: Path, **options: Any) -> Report:
    return merge(paths[:-1], paths[-1], progress=False, **options)


def refused(tmp_path: Path, match: str, *paths: Path, **options: Any) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=match) as raised:
        quiet_merge(*paths, tmp_path / "out", **options)
    assert "\n" not in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "nothing is left behind"


def logits(folders: Sequence[Path], implementation: Implementation = "base") -> Tensor:
    checkpoints = open_chain(folders)
    args = chained_args(checkpoints)
    spec = NetworkSpec(checkpoints=checkpoints, args=args, implementation=implementation)
    decoder = build(spec, dtype=torch.float32)
    with torch.no_grad():
        return decoder(IDS).logits


def close(a: Tensor, b: Tensor, bound: float = 1e-5) -> bool:
    return float((a - b).norm() / b.norm()) <= bound


def values(folder: Path) -> Tensors:
    return {name: tensor.load() for name, tensor in open_checkpoint(folder, allow_partial=True).tensors.items()}
