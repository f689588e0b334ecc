"""AdamW, the learning rate over time, clipping, and the scale that fp16 needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from accessory.parallel.local_shard import local

BETAS = (0.9, 0.95)
EPS = 1e-8


def learning_rate(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Linear from 0 over `warmup_epochs`, then half a cosine down to `min_lr` at the end of `epochs`."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    done = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to norms, biases, and the embeddings that begin and end an image."""
    return not (name.endswith(("norm.weight", "bias", "_img")) or parameter.dim() < 2)


def make_optimizer(named: Sequence[tuple[str, nn.Parameter]], weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over trained parameters. Sharded and plain parameters are in different groups."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        groups.setdefault((decays(name, parameter), isinstance(parameter, DTensor)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": params, "weight_decay": weight_decay if decayed else 0.0}
            for (decayed, _), params in groups.items()
        ],
        lr=0.0,
        betas=BETAS,
        eps=EPS,
        fused=any(local(p).is_cuda for _, p in named) or None,
    )


def allocate_moments(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Make the moments as AdamW does in its first step, to read a state into them. `step`: updates so far."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            on_device = group.get("fused") or group.get("capturable")
            count = torch.zeros((), dtype=torch.float32, device=local(p).device if on_device else "cpu")
            optimizer.state[p] = {
                "step": count + step,
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def updates_made(optimizer: torch.optim.Optimizer) -> int:
    """How often the optimiser has moved the parameters. In fp16 some steps make no update."""
    return next((int(state["step"]) for state in optimizer.state.values()), 0)


@torch.no_grad()
def scale_gradients(named: Sequence[tuple[str, nn.Parameter]], factor: float) -> None:
    """Multiply every gradient by `factor`, in place."""
    grads = [local(p.grad) for _, p in named if p.grad is not None]
    torch._foreach_mul_([g for g in grads if g.numel()], factor)


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
