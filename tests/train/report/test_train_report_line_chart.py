"""Axes contain all drawn values, leave room where it is needed, and show their unit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.train.report.frame import step_range
from accessory.train.report.line_chart import Band, Line, Points, ValueAxis, line_chart

numbers = st.floats(-1e6, 1e6).map(lambda x: round(x, 9))


@given(st.lists(st.one_of(numbers, st.just(float("nan"))), max_size=30), numbers, st.booleans())
@settings(max_examples=200, deadline=None)
def test_everything_finite_is_on_the_axis(values, reference, from_zero):
    values = np.array(values, float)
    axis = ValueAxis.of(values, reference, from_zero)
    assert axis.low < axis.high
    shown = values[np.isfinite(values)]
    assert all(axis.shows(value) for value in shown)
    if len(shown) and from_zero and not axis.log:
        assert axis.shows(0.0)
        assert axis.low == 0 or shown.min() < 0 or reference < 0
    if len(shown) and shown.min() <= reference <= shown.max():
        assert axis.shows(reference)


def test_an_axis_fits_what_it_shows():
    flat = ValueAxis.of(np.full(9, 5.0))
    assert flat.high - flat.low > 0.09  # the axis of a flat line is not stretched to rounding errors
    assert ValueAxis.of(np.array([1.05, 1.1]), 1.0).shows(1.0)  # near
    assert not ValueAxis.of(np.array([1.05, 1.06]), 8.0).shows(8.0)  # far: the curve would be flat
    spread = ValueAxis.of(np.array([1.0] * 9 + [500.0]))
    assert (spread.log, spread.note) == (True, "(logarithmic)")
    assert not ValueAxis.of(np.array([0.0] * 9 + [500.0])).log  # zero has no logarithm


@pytest.mark.parametrize(("size", "note"), [(2e-5, "× 1e-5"), (9.9e-5, "× 1e-5"), (1e-3, ""), (0.2, ""), (0.0, "")])
def test_small_values_have_a_unit(size, note):
    axis = ValueAxis.of(np.linspace(0, size, 5), from_zero=True)
    assert axis.note == note
    assert axis.power == 0 or 1 <= axis.scaled(size) < 10


def test_a_chart_says_what_is_in_it():
    steps = np.arange(1.0, 21)
    values = np.linspace(3, 1, 20)
    values[4] = np.nan
    chart = line_chart(
        "Loss",
        step_range(0, 20),
        steps,
        [Line("each step", values, "raw"), Line("smoothed", values)],
        points=Points("held out", np.array([0.0, 20.0]), np.array([4.0, 1.5])),
        band=Band("range of layers", steps, values - 0.1, values + 0.1),
        reference=(1.0, "fair: 1"),
        failed=steps[4:5],
        note="nats",
    )
    assert chart.legend == (
        ("raw", "each step"),
        ("main", "smoothed"),
        ("points", "held out"),
        ("band", "range of layers"),
        ("reference", "fair: 1"),
        ("failed", "no finite loss"),
    )
    assert chart.note == "nats"
    assert chart.description == (
        "Loss: smoothed from 3 to 1, lowest 1, highest 3; held out from 4 to 1.5, lowest 1.5, highest 4"
    )
    far = line_chart("Loss", step_range(1, 20), steps, [Line("", values)], reference=(90.0, "fair"))
    assert far.legend == ()  # a line outside the picture has no legend entry
    nothing = line_chart("Loss", step_range(1, 20), steps, [Line("", np.full(20, np.nan))])
    assert nothing.description == "Loss: has no finite value"
