"""Which rows belong to which step of which epoch, and how a step's rows are split over ranks and micro-steps."""

import math

import pytest
from helpers.numbered_items import Items, schedule
from hypothesis import given
from hypothesis import strategies as st

from accessory.errors import ConfigError
from accessory.train.dataloader import Split

# --------------------------------------------------------------------------- epochs


@pytest.mark.parametrize(
    ("epochs", "lengths"),
    [(1.0, [7]), (2.0, [7, 7]), (0.5, [4]), (1.5, [7, 4]), (0.01, [1]), (2.01, [7, 7, 1])],  # 7 · 0.5 rounds to 4
)
def test_parts_of_epochs(epochs, lengths):
    plan = schedule(Items(50), epochs=epochs)  # 50 rows, 8 a step: 7 steps an epoch
    assert plan.lengths == lengths
    assert plan.steps == sum(lengths)


def test_places_in_one_and_a_half_epochs():
    plan = schedule(Items(50), epochs=1.5)
    assert [plan.place(step) for step in (0, 6, 7, 10)] == [(0, 0), (0, 6), (1, 0), (1, 3)]
    assert plan.epoch_at(0) == 0
    assert plan.epoch_at(3.5) == pytest.approx(0.5)
    assert plan.epoch_at(7) == 1
    assert plan.epoch_at(11) == pytest.approx(1 + 4 / 7)
    assert [step for step in range(1, 12) if plan.ends_epoch(step)] == [7, 11]


def test_epochs_differ_and_seeds_too():
    data = Items(50)
    plan = schedule(data, epochs=2.0)
    assert [plan.rows(s) for s in range(7)] != [plan.rows(s) for s in range(7, 14)]
    again, other = schedule(data, epochs=2.0), schedule(data, epochs=2.0, seed=1)
    assert [plan.rows(s) for s in range(14)] == [again.rows(s) for s in range(14)]
    assert [plan.rows(s) for s in range(14)] != [other.rows(s) for s in range(14)]


def test_max_steps_cuts_and_never_adds():
    assert schedule(Items(50), max_steps=3).steps == 3
    assert schedule(Items(50), max_steps=30).steps == 7
    many = schedule(Items(50), epochs=1e9, max_steps=10)
    assert (many.steps, len(many.plans)) == (10, 2), "no epoch is planned that the run does not reach"


@pytest.mark.parametrize(
    ("epochs", "max_steps", "run"),
    [(2.0, None, 2.0), (2.0, 30, 2.0), (2.0, 7, 1.0), (2.0, 10, 10 / 7), (1.5, None, 11 / 7)],
)
def test_the_epochs_of_all_steps(epochs, max_steps, run):
    assert schedule(Items(50), epochs=epochs, max_steps=max_steps).epochs == pytest.approx(run)


# --------------------------------------------------------------------------- splits


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8))
def test_keeping_a_steps_rows(rows, batch_size, ranks):
    if rows % ranks:
        with pytest.raises(ConfigError, match=f"{rows} rows a step, which {ranks} data-parallel"):
            Split.keeping(rows, batch_size, ranks)
        return
    split = Split.keeping(rows, batch_size, ranks)
    assert split.rows == rows
    assert split.data_size == ranks
    assert split.batch_size <= batch_size
    larger = range(split.batch_size + 1, min(batch_size, rows // ranks) + 1)
    assert all((rows // ranks) % n for n in larger), "the largest that fits"
    assert math.prod((split.batch_size, split.accum_iter, split.data_size)) == rows
