"""Pages and scheduler, against a plain account of who holds which page, over random requests."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.engine.pages import PagePool, chain
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.scheduler import Scheduler, StepResult
from accessory.engine.sequence import Draw, Sequence
from accessory.errors import InputError
from accessory.limits import PAGE_SIZE


class Network:
    """Stands for the network: a token follows from all ids before it. It keeps what each page holds, as caches do."""

    def __init__(self, slots: int) -> None:
        self.ids = [[] for _ in range(slots)]  # of each slot's page table: page numbers
        self.content: dict[tuple[int, int], int] = {}  # (page, place) -> a digest of all ids up to there
        self.last = [None] * slots

    def run(self, plan) -> StepResult:
        draws = []
        for entry in plan.entries:
            if entry.begin is not None:
                self.ids[entry.slot] = []
            table = self.ids[entry.slot] = [*self.ids[entry.slot], *entry.pages]
            assert 0 not in entry.pages
            before = 0
            if entry.start:
                before = self.content[table[(entry.start - 1) // PAGE_SIZE], (entry.start - 1) % PAGE_SIZE]
            for n, token in enumerate([self.last[entry.slot]] if entry.ids is None else entry.ids, start=entry.start):
                before = hash((before, token))
                self.content[table[n // PAGE_SIZE], n % PAGE_SIZE] = before
            if entry.draw is not None:
                self.last[entry.slot] = before % 1000
                draws.append(Draw(before % 1000))
        return StepResult(draws, {})


def answer(ids, n, stops=()):
    """What the network writes after `ids`, alone."""
    before, out = 0, []
    for token in ids:
        before = hash((before, token))
    while len(out) < n and not (out and out[-1] in stops):
        out.append(before % 1000)
        before = hash((before, out[-1]))
    return out


def check_pool(pool, sequences):
    """Every page is held as often as sequences have it, and is otherwise free."""
    held = [0] * pool.pages
    for sequence in sequences:
        for page in sequence.pages:
            held[page] += 1
    assert held == pool._held
    assert pool.free == sum(1 for count in held[1:] if count == 0)


@settings(max_examples=60)
@given(st.data())
def test_every_request_gets_what_it_gets_alone(data):
    """Random lengths, common beginnings, stops, aborts, a pool that is too small, a host that plans ahead."""
    seed = data.draw(st.integers(0, 2**32))
    ahead = data.draw(st.integers(0, 1))
    how = {"whole": data.draw(st.booleans()), "deterministic": data.draw(st.booleans())}
    run_randomly(random.Random(seed), requests=25, ahead=ahead, **how)


@pytest.mark.slow
def test_no_page_is_lost_or_held_twice_over_100_000_operations():
    done = 0
    for seed in range(1000):
        done += run_randomly(random.Random(seed), requests=40, ahead=seed % 2, whole=seed % 3 == 0)
        if done > 100_000:
            return
    pytest.fail(f"only {done} operations")


def run_randomly(r: random.Random, requests: int, ahead: int, whole: bool, deterministic: bool = False) -> int:
    pages = r.randint(4, 30)
    pool = PagePool(pages)
    slots = r.randint(1, 6)
    budget = r.choice([1, 7, 64, 200, 1000])
    scheduler = Scheduler(pool, max_running=slots, budget=budget, whole=whole, deterministic=deterministic)
    network = Network(slots)
    beginnings = [[r.randrange(1000) for _ in range(r.randint(1, 200))] for _ in range(3)]
    every, under_way, operations = [], [], 0
    stops = frozenset(r.sample(range(1000), 5))
    while requests or any(not s.finished for s in every):
        operations += 1
        if requests and r.random() < 0.4:
            requests -= 1
            ids = [*r.choice(beginnings), *(r.randrange(1000) for _ in range(r.randint(0, 90)))]
            sequence = Sequence(ids, SamplingParams(), max_tokens=r.randint(1, 90), stop_ids=stops)
            sequence.asked = list(ids)
            try:
                scheduler.add(sequence)
                every.append(sequence)
            except InputError:
                assert -(-(len(ids) + sequence.max_tokens) // PAGE_SIZE) > pages - 1
        if every and r.random() < 0.03:
            scheduler.finish(r.choice(every), "abort")
        plan = scheduler.plan()
        if plan is not None:
            assert sum(1 if e.ids is None else len(e.ids) for e in plan.entries) <= scheduler.budget
            assert len({e.slot for e in plan.entries}) == len(plan.entries)
            under_way.append(network.run(plan))
        if under_way and (plan is None or len(under_way) > ahead):
            scheduler.commit(under_way.pop(0))
        check_pool(pool, every)
        assert operations < 100_000
    for sequence in every:
        expected = answer(sequence.asked, sequence.max_tokens, stops)
        got = sequence.ids[len(sequence.asked) :]
        if sequence.finished == "abort":
            assert got == expected[: len(got)]
        else:
            assert got == expected
            assert sequence.finished == ("stop" if expected[-1] in stops else "length")
        assert [d.token for d in sequence.drawn] == got
    assert pool.free == pages - 1
    assert not scheduler.running
    assert not scheduler.waiting
    assert not (deterministic and scheduler.counts.put_back)
    return operations


def test_equal_beginnings_are_computed_once():
    pool = PagePool(400)
    scheduler = Scheduler(pool, max_running=64, budget=4096)
    shared = list(range(2000))
    sequences = [Sequence([*shared, n, 7], SamplingParams(), max_tokens=4) for n in range(64)]
    for sequence in sequences:
        scheduler.add(sequence)
    computed = 0
    network = Network(64)
    while (plan := scheduler.plan()) is not None:
        computed += sum(len(e.ids) for e in plan.entries if e.ids)
        scheduler.commit(network.run(plan))
    assert all(s.ids[2002:] == answer(s.ids[:2002], 4) for s in sequences)
    assert 1 - (computed - 64 * 5) / (64 * 2002) >= 0.95
    assert scheduler.counts.cached_tokens == 63 * (2000 // PAGE_SIZE) * PAGE_SIZE


def run_to_the_end(scheduler, network):
    while (plan := scheduler.plan()) is not None:
        scheduler.commit(network.run(plan))


@pytest.mark.parametrize(("deterministic", "together"), [(False, 2), (True, 1)])
def test_a_deterministic_request_begins_when_there_are_pages_for_its_whole_answer(deterministic, together):
    """Five pages; each of two requests takes one at first, and three in the end."""
    scheduler = Scheduler(PagePool(6), max_running=4, budget=1000, deterministic=deterministic)
    requests = [Sequence([n, *range(40)], SamplingParams(), max_tokens=140) for n in (1, 2)]
    for request in requests:
        scheduler.add(request)
    network = Network(4)
    scheduler.commit(network.run(scheduler.plan()))
    assert len(scheduler.running) == together
    run_to_the_end(scheduler, network)
    assert [request.finished for request in requests] == ["length", "length"]
    assert (scheduler.counts.put_back > 0) != deterministic


@pytest.mark.parametrize(("deterministic", "shared"), [(False, 2), (True, 1)])
def test_pages_filled_while_decoding_are_shared_only_where_bits_may_differ(deterministic, shared):
    scheduler = Scheduler(PagePool(20), max_running=4, budget=1000, deterministic=deterministic)
    network, first = Network(4), Sequence(list(range(70)), SamplingParams(), max_tokens=90)
    scheduler.add(first)
    plan = scheduler.plan()
    assert [entry.decodes for entry in plan.entries] == [False]
    scheduler.commit(network.run(plan))
    plan = scheduler.plan()
    assert [(entry.start, entry.decodes) for entry in plan.entries] == [(70, True)]
    scheduler.commit(network.run(plan))
    run_to_the_end(scheduler, network)
    follows = Sequence([*first.ids, 3], SamplingParams(), max_tokens=5)  # a dialogue goes on
    scheduler.add(follows)
    run_to_the_end(scheduler, network)
    assert follows.cached == shared * PAGE_SIZE
    again = Sequence([*first.ids, 4], SamplingParams(), max_tokens=5)  # now a prompt has filled the pages
    scheduler.add(again)
    run_to_the_end(scheduler, network)
    assert again.cached == 2 * PAGE_SIZE


def test_other_weights_adapters_and_images_share_nothing():
    pool = PagePool(100)
    scheduler = Scheduler(pool, max_running=8, budget=4096)
    network = Network(8)
    for root in (b"a", b"b", b"a"):
        scheduler.add(sequence := Sequence(list(range(200)), SamplingParams(), max_tokens=1, root=root))
        scheduler.commit(network.run(scheduler.plan()))
    assert sequence.cached == 192
    assert scheduler.counts.cached_tokens == 192


def test_the_least_recently_used_page_goes_first():
    pool = PagePool(4)
    first, second, third = (pool.take(1) for _ in range(3))
    for page, name in ((first, b"1"), (second, b"2"), (third, b"3")):
        pool.publish(page[0], chain(b"", [ord(name)]))
        pool.release(page)
    assert pool.share([chain(b"", [ord("1")])]) == first  # used again
    pool.release(first)
    assert pool.take(1) == second
    assert pool.share([chain(b"", [ord("2")])]) == []
    assert pool.share([chain(b"", [ord("1")])]) == first


def test_pages_lie_side_by_side_where_they_can():
    pool = PagePool(40)
    one = pool.take(3)
    other = pool.take(5)
    assert one == [1, 2, 3]
    assert other == [4, 5, 6, 7, 8]
    assert pool.take(2, after=8) == [9, 10]
    pool.release(one)
    assert pool.take(4) == [11, 12, 13, 14]  # three in a row are not enough
    assert pool.take(3) == [1, 2, 3]
