"""Images encoded by all ranks that hold one model: each runs its share of the views, then everyone has all features.

Letters of shapes: I images, P pixels each way, V views.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.nn.vision import Features, VisionTower
from accessory.parallel.mesh import Ranks


def encode_shared(tower: VisionTower, pixels_I3PP: Tensor, ranks: Ranks | None) -> Features:
    """`tower.encode`, its work split over `ranks`, all of which call this with the same images.

    Every rank has a whole tower and gets, and keeps, all features. What is split is views, not images, so that four
    ranks share even one image of five views. Raises as `VisionTower.encode`.
    """
    if ranks is None or ranks.size == 1:
        return tower.encode(pixels_I3PP)
    return tower.encode(pixels_I3PP, agree=partial(_missing_anywhere, tower, ranks), run=partial(_run, tower, ranks))


def _missing_anywhere(tower: VisionTower, ranks: Ranks, missing: list[bool]) -> list[bool]:
    """Ranks may have kept different images (one may have encoded something alone), but must run the same ones."""
    flags = torch.tensor(missing, dtype=torch.int32, device=tower.device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=ranks.group)
    return [bool(flag) for flag in flags.tolist()]


def _run(tower: VisionTower, ranks: Ranks, pixels_I3PP: Tensor) -> Features:
    views = len(pixels_I3PP) * tower.views
    share = -(-views // ranks.size)
    first = min(ranks.rank * share, views)
    own = tower.run(pixels_I3PP, first, min(share, views - first))
    return own.map(lambda own_VTC: _gathered(own_VTC, share, views, ranks))


def _gathered(own_VTC: Tensor, share: int, views: int, ranks: Ranks) -> Tensor:
    """The ranks' tensors one below the other, each filled up to `share` views for the way."""
    sent_VTC = own_VTC.new_zeros(share, *own_VTC.shape[1:])
    sent_VTC[: len(own_VTC)] = own_VTC
    # As bytes: not every backend knows every dtype.
    all_VTC = sent_VTC.new_empty(ranks.size * share, *own_VTC.shape[1:])
    parts = list(all_VTC.view(torch.uint8).chunk(ranks.size))
    dist.all_gather(parts, sent_VTC.view(torch.uint8), group=ranks.group)
    return all_VTC[:views]
