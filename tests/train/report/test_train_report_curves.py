"""Smoothing keeps what a curve says, thinning keeps its extremes."""

from __future__ import annotations

import numpy as np
import pytest

from accessory.train.report.curves import one_a_bucket, smoothed, thinned


def test_smoothing_keeps_lines_and_passes_over_gaps():
    line = np.linspace(3.0, 1.0, 600)
    np.testing.assert_allclose(smoothed(line)[:-10], line[:-10], atol=1e-12)
    noisy = line + np.random.default_rng(0).normal(size=600)
    assert np.abs(smoothed(noisy) - line)[30:-10].max() < 1
    noisy[100:105] = np.nan
    assert np.isfinite(smoothed(noisy)).all()
    noisy[200:300] = np.nan
    assert np.isnan(smoothed(noisy)[250])
    assert smoothed(noisy)[0] == noisy[0]
    np.testing.assert_array_equal(smoothed(noisy[:20]), noisy[:20])


def test_a_long_line_keeps_its_extremes_its_ends_and_its_gaps():
    values = np.random.default_rng(1).uniform(size=100_000)
    values[77_777], values[3] = 3.0, -2.0
    values[50_000:51_000] = np.nan
    picks = thinned(values)
    assert len(picks) <= 802
    assert (np.diff(picks) > 0).all()
    assert {0, 3, 77_777, 99_999} <= set(picks)
    for part in np.array_split(values, 400):
        kept = values[picks[np.isin(values[picks], part)]]
        if np.isfinite(part).any():
            assert (kept.min(), kept.max()) == (np.nanmin(part), np.nanmax(part))
    assert np.isnan(values[picks]).any()
    np.testing.assert_array_equal(thinned(values[:800]), np.arange(800))


def test_marks_of_steps_are_few_and_everywhere():
    few = np.array([3.0, 4.0, 900.0])
    np.testing.assert_array_equal(one_a_bucket(few), few)
    many = np.r_[1.0, np.arange(50_000.0, 100_000.0)]
    kept = one_a_bucket(many)
    assert len(kept) <= 800
    assert (kept[0], kept[1], kept[-1]) == (1.0, 50_000.0, pytest.approx(99_999, abs=130))
    assert np.diff(kept[1:]).max() <= 130
