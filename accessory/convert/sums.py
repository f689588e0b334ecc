"""Check number by number that the weights to be written are W + scale · B·A, rounded.

The sum is computed here anew, in fp64 and by the plain definition, so that a mistake in `merge` does not repeat itself.
`merge` adds in fp32, in an order that is the machine's. Its sum may therefore differ from ours by as much as r + 6
roundings of fp32, each of at most half a unit in the last place of |W| + |scale| · |B|·|A|. Rounding keeps the order of
numbers. So the written number must lie between our sum less that much, rounded, and our sum plus that much, rounded.
No valid merge can fail this. In bf16 the two ends are almost always the same number.

Legend: O rows, I columns of a weight, R rank, n a block of rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from accessory.checkpoint.hashing import each_tensor
from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.names import companion_of
from accessory.errors import CheckpointError, listed

_BLOCK = 2**20  # numbers that are compared at once: a few fp64 copies of them are in memory
_HALF_UNIT = torch.finfo(torch.float32).eps / 2
_ROUNDINGS = 6  # of W, B, A and scale to fp32, of their product, and of the last sum
_UNDERFLOW = torch.finfo(torch.float32).tiny  # products below it may be taken for zero


def check_sums(
    written: Mapping[str, Lazy], tensors: Mapping[str, Lazy], scale: float, *, progress: bool = True
) -> None:
    """Raise CheckpointError unless `written` is what `tensors` become when their LoRA adapters are merged.

    Both map canonical names to whole tensors. A weight with LoRA must be W + scale · B·A, rounded to its written dtype.
    Every other tensor must be the same number by number, except for its dtype.
    """
    wanted = {n: t for n, t in tensors.items() if companion_of(n) is None or n.endswith(".bias")}
    if written.keys() != wanted.keys():
        odd = sorted(written.keys() ^ wanted.keys())
        raise CheckpointError(f"merged tensors are not those of the model: {listed(odd)}; nothing was written")
    # An unchanged lazy tensor is the same one, and reading it twice would prove nothing.
    wanted = {n: t for n, t in wanted.items() if written[n] is not t}

    def count(name: str, weight: Lazy) -> int:
        linear = name.removesuffix("weight")
        a, b = tensors.get(linear + "lora_a.weight"), tensors.get(linear + "lora_b.weight")
        if a is None or b is None or not name.endswith("weight"):
            return int((written[name].load() != weight.to(written[name].dtype).load()).sum())
        return _count_wrong(written[name].load(), weight.load(), a.load(), b.load(), scale)

    wrong = {
        n: number
        for n, number in each_tensor(wanted, count, progress=progress, title="checking sums").items()
        if number
    }
    if wrong:
        first = next(iter(wrong))
        total = torch.Size(tensors[first].shape).numel()
        raise CheckpointError(
            f"merged weights are not W + scale·B·A rounded: {listed(wrong)}; in the first, {wrong[first]:,} of "
            f"{total:,} numbers differ by more than rounding can do; nothing was written"
        )


def _count_wrong(written_OI: Tensor, w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> int:
    """How many numbers of a merged weight lie outside of what rounding allows."""
    a_RI, wrong = a_RI.double(), 0
    slack = (a_RI.shape[0] + _ROUNDINGS) * _HALF_UNIT
    rows = max(1, _BLOCK // w_OI.shape[1])
    for start in range(0, w_OI.shape[0], rows):
        w_nI, b_nR, got_nI = (t[start : start + rows] for t in (w_OI, b_OR, written_OI))
        w_nI, b_nR = w_nI.double(), b_nR.double() * scale
        sum_nI = w_nI + b_nR @ a_RI
        most_nI = (w_nI.abs() + b_nR.abs() @ a_RI.abs()).mul_(slack).add_(_UNDERFLOW)
        low_nI, high_nI = ((sum_nI + s * most_nI).float().to(got_nI.dtype) for s in (-1, 1))
        wrong += int(((got_nI >= low_nI) & (got_nI <= high_nI)).logical_not_().sum())  # NaN counts too
    return wrong
