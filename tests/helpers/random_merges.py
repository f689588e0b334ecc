"""Random valid adapters over random tiny models, in all dtypes; updates are a millionth of a weight, or its size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accessory.checkpoint.lazy import Constant, Lazy
from accessory.checkpoint.names import expected_shapes
from accessory.config import Implementation, ModelArgs, MoEArgs
from accessory.convert.certify import Certificate
from accessory.convert.merge import merge_tensors, prove
from helpers.adapters import linears

TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "gate", "output")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RandomMerge:
    """A model with an adapter, as tensors in memory, and the dtype that the merged one is to have."""

    args: ModelArgs
    base: dict[str, Lazy]
    tensors: dict[str, Lazy]  # the base's and the adapter's
    dtype: torch.dtype
    implementation: Implementation

    def merged(self) -> dict[str, Lazy]:
        return merge_tensors(self.tensors, self.args, self.dtype)[0]

    def prove(self, merged: dict[str, Lazy] | None = None) -> Certificate:
        """As `accessory merge` does before it writes."""
        found = self.merged() if merged is None else merged
        return prove(self.base, self.tensors, found, self.args, self.implementation, dtype=self.dtype, progress=False)


def random_merge(seed: int, *, size: float | None = None, dtype: torch.dtype | None = None) -> RandomMerge:
    """All random choices depend on `seed`. size: of B·A·scale relative to the weight; dtype: of the merged weights."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=g))]

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=g))

    heads, rank = pick(2, 4), pick(1, 2, 3, 4, 8, 16)
    args = ModelArgs(
        dim=pick(16, 32, 48),
        hidden_dim=pick(16, 24, 64),
        n_layers=pick(1, 2, 3),
        n_heads=heads,
        n_kv_heads=pick(1, 2),
        head_dim=pick(8, 16),
        vocab_size=pick(48, 80),
        moe=MoEArgs(num_experts=pick(2, 4), num_experts_per_tok=pick(1, 2)),
        lora_rank=rank,
        lora_alpha=pick(None, 1.0, 7.0, 16.0, 64.0),
    )
    targets = tuple(t for t in TARGETS if pick(True, True, False)) or ("w2",)
    size = 10 ** uniform(-6, 0) if size is None else size
    std, stored = 10 ** uniform(-2, -0.3), pick(*DTYPES)
    base = {}
    for name, shape in expected_shapes(args).items():
        drawn = torch.randn(shape, generator=g)
        weight = 1 + 0.1 * drawn if name.endswith("norm.weight") else std * drawn
        base[name] = Constant(weight.to(stored))
    tensors: dict[str, Lazy] = dict(base)
    adapter = pick(torch.float32, torch.float32, torch.bfloat16)
    for linear, (rows, columns) in linears(args, targets).items():
        each = (size * std / (args.lora_scale * rank**0.5)) ** 0.5
        for side, shape in (("lora_a", (rank, columns)), ("lora_b", (rows, rank))):
            tensors[f"{linear}.{side}.weight"] = Constant((each * torch.randn(shape, generator=g)).to(adapter))
    return RandomMerge(args, base, tensors, dtype or pick(*DTYPES), pick("base", "sparse"))
