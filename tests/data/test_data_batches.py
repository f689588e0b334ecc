"""Cutting epochs into steps of rows, and making tensors of rows."""

import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.data.batches import IGNORED, Batch, EpochPlan, collate
from accessory.data.dataset import Example
from accessory.errors import InputError

BOS = 1
MAX = 32


@st.composite
def item_sets(draw):
    """(lengths, groups) of some items."""
    n = draw(st.integers(1, 60))
    lengths = draw(st.lists(st.integers(2, MAX), min_size=n, max_size=n))
    groups = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    return lengths, groups


def plan(lengths, groups=None, *, rows=3, max_words=MAX, packing=True, seed=0, epoch=0):
    groups = [0] * len(lengths) if groups is None else groups
    return EpochPlan(lengths, groups, rows_per_step=rows, max_words=max_words, packing=packing, seed=seed, epoch=epoch)


def all_steps(p):
    return [p.rows(s) for s in range(p.steps)]


@given(item_sets(), st.integers(1, 7), st.booleans(), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_an_epoch(items, rows, packing, seed, epoch):
    lengths, groups = items
    p = plan(lengths, groups, rows=rows, packing=packing, seed=seed, epoch=epoch)
    steps = all_steps(p)
    seen = [item for step in steps for row in step for item in row]
    assert sorted(seen) == list(range(len(lengths))), "every item exactly once"
    assert all(len(step) == rows for step in steps)
    assert all(sum(lengths[i] for i in row) <= MAX for step in steps for row in step)
    assert all(len(row) <= 1 for step in steps for row in step) or packing
    groups_of_steps = [{groups[i] for row in step for i in row} for step in steps]
    assert all(len(found) == 1 for found in groups_of_steps), "groups never meet, and no step is empty"
    for group in set(groups):
        short = [step for step, found in zip(steps, groups_of_steps, strict=True) if found == {group} and () in step]
        assert len(short) <= 1, "only one step of a group is not full"
    assert steps == all_steps(plan(lengths, groups, rows=rows, packing=packing, seed=seed, epoch=epoch))
    assert p.fill == pytest.approx(sum(lengths) / (len(steps) * rows * MAX))


@pytest.mark.parametrize("packing", [True, False])
def test_epochs_and_seeds_differ(packing):
    lengths = np.random.default_rng(0).integers(2, MAX, 200)
    orders = [all_steps(plan(lengths, packing=packing, seed=s, epoch=e)) for s, e in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(orders[a] != orders[b] for a in range(4) for b in range(a))
    contents = [{frozenset(i for row in step for i in row) for step in steps} for steps in orders]
    assert contents[0] != contents[1], "other items meet in another epoch, not only in another order"


@pytest.mark.parametrize("epoch", range(3))
def test_without_packing_steps_hold_neighbours_by_length(epoch):
    lengths = np.random.default_rng(0).integers(2, MAX, 203)
    spans = []
    for step in all_steps(plan(lengths, rows=4, packing=False, epoch=epoch)):
        own = [lengths[i] for row in step for i in row]
        spans.append((min(own), max(own)))
    ordered = sorted(spans)
    assert all(a[1] <= b[0] for a, b in pairwise(ordered)), "stretches of one sorted order"
    assert spans != ordered, "in a random order"


@pytest.mark.parametrize(
    ("name", "bound"),
    [("short dialogues", 0.995), ("log-normal", 0.99), ("uniform", 0.98), ("exponential", 0.995)],
)
def test_packing_fills_rows_and_is_fast(name, bound):
    random, n, most = np.random.default_rng(0), 100_000, 4096
    lengths = {
        "short dialogues": random.normal(230, 60, n),
        "log-normal": random.lognormal(6, 1, n),
        "uniform": random.uniform(2, most, n),
        "exponential": random.exponential(700, n),
    }[name]
    lengths = np.clip(lengths, 2, most).astype(int)
    begin = time.perf_counter()
    p = plan(lengths, rows=32, max_words=most)
    assert time.perf_counter() - begin < 2
    assert p.fill > bound - 1 / p.steps  # one step may be nearly empty
    assert p.fill > 0.95


def test_long_items_can_only_be_packed_so_well():
    p = plan([20] * 10, rows=2)  # two items do not fit into a row of 32
    assert p.steps == 5
    assert p.fill == pytest.approx(20 / 32)


def test_items_longer_than_a_row_are_refused():
    with pytest.raises(InputError, match="max_words: got 32, but there is an item of 33 tokens"):
        plan([33])


# --------------------------------------------------------------------------- collate


@st.composite
def documents(draw):
    """Rows of documents. Each document begins with BOS and has no other BOS."""

    def document():
        n = draw(st.integers(2, 9))
        ids = [BOS, *draw(st.lists(st.integers(2, 20), min_size=n - 1, max_size=n - 1))]
        return Example(ids, [False, *draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1))])

    return [[document() for _ in range(draw(st.integers(0, 4)))] for _ in range(draw(st.integers(1, 4)))]


def pairs(batch: Batch) -> Counter:
    """Counts (ids a query may attend to, its label), read from the tensors of documents and positions."""
    found: Counter = Counter()
    for b in range(len(batch.tokens_BT)):
        for t in range(batch.tokens_BT.shape[1]):
            if batch.labels_BT[b, t] != IGNORED:
                own = batch.documents_BT[b] == batch.documents_BT[b, t]
                own &= batch.positions_BT[b] <= batch.positions_BT[b, t]
                found[tuple(batch.tokens_BT[b, own].tolist()), int(batch.labels_BT[b, t])] += 1
    return found


def pairs_of(examples) -> Counter:
    return Counter((tuple(e.ids[:t]), e.ids[t]) for e in examples for t in range(1, len(e.ids)) if e.learn[t])


@given(documents())
@settings(max_examples=100, deadline=None)
def test_a_batch(rows):
    everything = [e for row in rows for e in row]
    batch = collate(rows, range(len(everything)))
    assert pairs(batch) == pairs_of(everything)
    if everything:
        assert pairs(collate([[e] for e in everything], [])) == pairs(batch), "packed or not, the same is learnt"
    assert batch.items == tuple(range(len(everything)))
    assert int(batch.counted_BT.sum()) == sum(len(e.ids) for e in everything)
    assert (batch.labels_BT[~batch.counted_BT] == IGNORED).all(), "padding is not learnt"
    assert (batch.tokens_BT[~batch.counted_BT] == 0).all()
    begins = batch.counted_BT & (batch.positions_BT == 0)
    assert torch.equal(begins, batch.tokens_BT == BOS), "one BOS a document, at its beginning"
    for b, row in enumerate(rows):
        assert batch.tokens_BT[b, batch.counted_BT[b]].tolist() == [t for e in row for t in e.ids]
        expected = [n for n, e in enumerate(row) for _ in e.ids]
        assert batch.documents_BT[b, batch.counted_BT[b]].tolist() == expected
        assert (batch.documents_BT[b, ~batch.counted_BT[b]] == len(row)).all(), "padding is a document of its own"
        positions = [p for e in row for p in range(len(e.ids))]
        assert batch.positions_BT[b, batch.counted_BT[b]].tolist() == positions
    tensors = (batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.documents_BT)
    assert all(t.dtype == torch.int64 for t in tensors)
    assert batch.counted_BT.dtype == torch.bool


def test_by_hand():
    first = Example([1, 5, 6, 7], [False, False, True, True])
    second = Example([1, 8, 9], [False, True, False])
    batch = collate([[first, second], []], (4, 2), pad_id=3, length=8)
    assert batch.tokens_BT.tolist() == [[1, 5, 6, 7, 1, 8, 9, 3], [3] * 8]
    assert batch.labels_BT.tolist() == [[-100, 6, 7, -100, 8, -100, -100, -100], [-100] * 8]
    assert batch.documents_BT.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2], [0] * 8]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], list(range(8))]
    assert batch.counted_BT.tolist() == [[True] * 7 + [False], [False] * 8]
    moved = batch.to("meta")
    assert (moved.labels_BT.device.type, moved.items) == ("meta", (4, 2))
    with pytest.raises(InputError, match="length: got 6, but there is a row of 7 tokens"):
        collate([[first, second]], (), length=6)
