"""Which rows a run learns from: the same whoever shares them, over whole epochs and parts of one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.data.dataset import Example
from accessory.errors import ConfigError
from accessory.parallel.fsdp import Grid
from accessory.train.feed import Feed, Schedule, Split


class Items:
    """Data as the feed sees it: item i is i + 2 tokens of the number i."""

    def __init__(self, count: int, groups: int = 1) -> None:
        self.lengths = np.arange(count, dtype=np.int32) % 9 + 2
        self.groups = np.arange(count, dtype=np.int32) % groups

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, i: int) -> Example:
        n = int(self.lengths[i])
        return Example(ids=[i] * n, learn=[False] + [True] * (n - 1))


class Place:
    """A data-parallel rank's place in a grid, without processes."""

    def __new__(cls, rank: int, size: int) -> Grid:
        class Ranks:
            pass

        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        return Grid(data=ranks)


def schedule(data, rows=8, *, packing=False, epochs=1.0, max_steps=None, seed=0):
    return Schedule(data, rows=rows, max_words=16, packing=packing, seed=seed, epochs=epochs, max_steps=max_steps)


def rows_of(batch):
    """What each row of a batch holds, as (item, tokens) of its documents; padding left out."""
    out = []
    for tokens, documents, counted in zip(batch.tokens_BT, batch.documents_BT, batch.counted_BT, strict=True):
        numbers = documents[counted].unique().tolist()
        out.append(tuple((int(tokens[documents == n][0]), int((documents == n).sum())) for n in numbers))
    return out


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 60),
    groups=st.integers(1, 3),
    packing=st.booleans(),
    seed=st.integers(0, 5),
    split=st.sampled_from([(8, 1, 1), (4, 2, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4), (1, 1, 8), (2, 1, 4)]),
)
def test_a_step_holds_the_same_rows_however_it_is_shared(count, groups, packing, seed, split):
    data, split = Items(count, groups), Split(*split)
    plan = schedule(data, packing=packing, seed=seed)
    feeds = [Feed(data, plan, split, Place(rank, split.data_size)) for rank in range(split.data_size)]
    seen = []
    for step in range(plan.steps):
        wanted = plan.rows(step)
        got = [rows for feed in feeds for batch in feed.batches(step) for rows in rows_of(batch)]
        assert sorted(got) == sorted(tuple((i, int(data.lengths[i])) for i in row) for row in wanted)
        for feed in feeds:
            batches = feed.batches(step)
            assert len(batches) == split.accum_iter
            assert all(batch.tokens_BT.shape[0] == split.batch_size for batch in batches)
        items = [i for row in wanted for i in row]
        assert len({int(data.groups[i]) for i in items}) == 1
        seen += items
    assert sorted(seen) == list(range(count))


def test_micro_batches_are_consecutive_over_the_ranks():
    """Micro-step m of rank r begins at row (m · ranks + r) · batch_size: a micro-step is one piece of the step."""
    data, split = Items(8), Split(1, 4, 2)
    plan = schedule(data)
    order = [row[0] for row in plan.rows(0)]
    got = [[batch.items[0] for batch in Feed(data, plan, split, Place(rank, 2)).batches(0)] for rank in range(2)]
    assert got == [order[0::2], order[1::2]]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_change_nothing(workers):
    data = Items(50)
    plan = schedule(data, epochs=2.0)
    feed = Feed(data, plan, Split(4, 2, 1), Grid(), workers=workers)
    got = list(feed.steps(3))
    assert [step for step, _ in got] == list(range(3, plan.steps))
    for step, batches in got:
        for a, b in zip(batches, feed.batches(step), strict=True):
            assert torch.equal(a.tokens_BT, b.tokens_BT)


def test_an_error_of_a_thread_reaches_the_run():
    data = Items(50)
    data.example = lambda i: (_ for _ in ()).throw(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        list(Feed(data, schedule(data), Split(8, 1, 1), Grid(), workers=2).steps(0))


def test_evaluation_sees_everything_once():
    data = Items(21)
    for size in (1, 2):
        plan = schedule(data, rows=4 * size)
        parts = [Feed(data, plan, Split(4, 1, size), Place(rank, size)).all_batches() for rank in range(size)]
        assert len({len(part) for part in parts}) == 1  # or a rank would wait for another in the last collective
        assert sorted(i for part in parts for batch in part for i in batch.items) == list(range(21))


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
