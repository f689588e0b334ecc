"""What is done to a curve before it is drawn: smoothing, and thinning out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accessory.train.report.layer_bins import Floats

BUCKETS = 400  # parts of a long curve; each keeps its lowest and its highest value


def smoothed(values: Floats) -> Floats:
    """Means over a window of a thirtieth of the run around each step, without its NaN.

    At the beginning the window narrows to both sides, since curves are steep there; at the end it loses one side.
    """
    half = len(values) // 60
    if half == 0:
        return values
    shown = np.isfinite(values)
    sums = np.cumsum(np.r_[0.0, np.where(shown, values, 0.0)])
    counts = np.cumsum(np.r_[0, shown])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(np.minimum(at + half, 2 * at), len(values) - 1) + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts[high] > counts[low], (sums[high] - sums[low]) / (counts[high] - counts[low]), np.nan)


def thinned(values: Floats, buckets: int = BUCKETS) -> NDArray[np.intp]:
    """The places of at most two values a bucket, its lowest and its highest, and of the two ends, in their order.

    A bucket without a finite value keeps its first place, so that a gap stays one.
    """
    if len(values) <= 2 * buckets:
        return np.arange(len(values))
    places = [0, len(values) - 1]
    for bucket in np.array_split(np.arange(len(values)), buckets):
        shown = bucket[np.isfinite(values[bucket])]
        places += [shown[values[shown].argmin()], shown[values[shown].argmax()]] if len(shown) else [bucket[0]]
    return np.unique(places)


def one_a_bucket(steps: Floats, buckets: int = 2 * BUCKETS) -> Floats:
    """The first of the `steps` (N,), which ascend, in each bucket of their span: marks that can be told apart."""
    if len(steps) <= buckets:
        return steps
    bucket = np.floor((steps - steps[0]) / (steps[-1] - steps[0]) * (buckets - 1))
    return steps[np.unique(bucket, return_index=True)[1]]
