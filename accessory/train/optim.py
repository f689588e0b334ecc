"""Which optimiser a run has, the learning rate over time, and the scale that fp16 needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from accessory.parallel.local_shard import local
from accessory.planner.setup import Offload, OptimizerKind
from accessory.train.adamw import AdamW
from accessory.train.adamw_offload import OffloadedAdamW


def learning_rate(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Linear from 0 over `warmup_epochs`, then half a cosine down to `min_lr` at the end of `epochs`."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    done = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def make_optimizer(
    named: Sequence[tuple[str, nn.Parameter]],
    weight_decay: float,
    *,
    kind: OptimizerKind = "adamw",
    offload: Offload = "none",
    wholes: Mapping[str, tuple[int, ...]] | None = None,
) -> AdamW:
    """The optimiser of trained parameters. wholes: the shapes of the uncut parameters, by name.

    On a CPU moments lie in host memory anyway, and `offload` changes nothing.
    """
    if kind == "adamw_8bit":
        from accessory.train.adamw_8bit import AdamW8bit  # needs an extra

        return AdamW8bit(named, weight_decay, wholes)
    on_gpu = any(local(p).is_cuda for _, p in named)
    return (OffloadedAdamW if offload == "optimizer" and on_gpu else AdamW)(named, weight_decay)


@dataclass
class LossScale:
    """Dynamic loss scaling (arXiv 1710.03740) for fp16, whose small gradients vanish; 1 for wider dtypes."""

    value: float
    good: int = 0  # steps since the last change
    growth_interval: int = 2000

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> LossScale:
        return cls(2.0**16 if dtype == torch.float16 else 1.0)

    @property
    def dynamic(self) -> bool:
        return self.value != 1.0

    def update(self, finite: bool) -> None:
        if not self.dynamic:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(2.0, self.value / 2)
        elif self.good >= self.growth_interval:
            self.value, self.good = self.value * 2, 0
