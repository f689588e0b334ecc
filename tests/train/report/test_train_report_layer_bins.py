"""Bins of layers' values over time: there are few, and their means include every step."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.train.report.layer_bins import LayerBins


@given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_bins_are_few_and_forget_nothing(steps, half, seed):
    values = np.random.default_rng(seed).normal(size=(steps, 2, 3))
    bins = LayerBins(2 * half)
    for step, value in enumerate(values, start=1):
        bins.add(step, value)
    bins.add(steps + 1, np.zeros((5, 5)))  # a shape of another network
    width = bins.width
    assert len(bins) <= 2 * half
    assert len(bins) == math.ceil(steps / width)
    chunks = [values[n : n + width] for n in range(0, steps, width)]
    np.testing.assert_allclose(bins.means(), [chunk.mean(0) for chunk in chunks], atol=1e-12)
    assert bins.steps().tolist() == list(range(1, steps + 1, width))
