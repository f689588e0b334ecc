"""Splits the encoding of images between a model's ranks: each runs its share of the views, then all get all features.

Legend: I images, P height and width in pixels, V views.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.nn.vision import Features, VisionTower
from accessory.parallel.mesh import Ranks


def encode_shared(tower: VisionTower, pixels_I3PP: Tensor, ranks: Ranks | None) -> Features:
    """`tower.encode` with its work split over `ranks`. All ranks must call it with the same images.

    Every rank has a whole tower, and returns and caches all features. Views are split instead of images, so that four
    ranks can share one image of five views. Raises the errors of `VisionTower.encode`.
    """
    if ranks is None or ranks.size == 1:
        return tower.encode(pixels_I3PP)
    return tower.encode(pixels_I3PP, agree=partial(_missing_anywhere, tower, ranks), run=partial(_run, tower, ranks))


def _missing_anywhere(tower: VisionTower, ranks: Ranks, missing: list[bool]) -> list[bool]:
    """The images that any rank lacks. Caches may differ (a rank may have encoded an image alone), but all ranks must
    run the same images."""
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
    """Concatenate the ranks' views: (views, T, C). Each rank sends `share` views, padded with zeros."""
    sent_VTC = own_VTC.new_zeros(share, *own_VTC.shape[1:])
    sent_VTC[: len(own_VTC)] = own_VTC
    # Sent as bytes, because not every backend supports every dtype.
    all_VTC = sent_VTC.new_empty(ranks.size * share, *own_VTC.shape[1:])
    parts = list(all_VTC.view(torch.uint8).chunk(ranks.size))
    dist.all_gather(parts, sent_VTC.view(torch.uint8), group=ranks.group)
    return all_VTC[:views]
