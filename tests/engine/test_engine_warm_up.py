"""What an engine computes before anybody asks: steps of every kind, of which nothing stays."""

from __future__ import annotations

import random
import threading

import pytest
from helpers.traffic import (
    PAGES,
    Wish,
    alone,
    answers,
    check_against,
    check_empty,
    random_wishes,
    rich_decoder,
    rich_runner,
    tiny_engine,
    tiny_runner,
    written,
)

from accessory.engine.engine import Engine
from accessory.engine.executor import LocalExecutor
from accessory.engine.pages import PagePool
from accessory.engine.runner import About
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.scheduler import Counts, Scheduler, StepResult
from accessory.engine.sequence import Draw, Sequence
from accessory.engine.warm_up import rounds, warm_up
from accessory.errors import RankError
from accessory.limits import GRAPH_BUCKETS


class Recorder:
    """An executor without a network. It keeps the plans, and every draw is the token 7."""

    ahead = 1

    def __init__(self, fails_at=None):
        self.plans, self.fails_at = [], fails_at

    def submit(self, plan):
        self.plans.append(plan.entries)
        if len(self.plans) == self.fails_at:
            raise RankError("a rank is gone")
        result = StepResult([Draw(7) for entry in plan.entries if entry.draw is not None], {})
        return type("Handle", (), {"result": lambda self: result})()

    def drop(self):
        pass


def recorded(pages=2000, max_seq_len=2048, adapters=0):
    """The plans of a GPU's engine that is warmed up, and the engine."""
    about = About(pages, max_running=256, step_tokens=4096, on_cpu=False, max_seq_len=max_seq_len, vocab_size=1000)
    engine = Engine.of(Recorder(), about)
    warm_up(engine, adapters)
    return engine.executor.plans, engine


def tokens(entry):
    return 1 if entry.ids is None else len(entry.ids)


@pytest.mark.parametrize("adapters", [0, 2])
def test_every_kind_of_step_is_computed(adapters):
    plans, engine = recorded(adapters=adapters)
    check_empty(engine)
    named = {entry.begin.adapter for plan in plans for entry in plan if entry.begin is not None}
    assert named == ({-1, 0} if adapters else {-1})
    decoding = [len(plan) for plan in plans if all(entry.decodes for entry in plan)]
    assert sum(map(tokens, plans[0])) == 4096  # the largest step first: graphs take their memory from one pool
    assert max(decoding) == 256
    assert set(decoding) >= set(GRAPH_BUCKETS)
    begin = [plan for plan in plans if all(entry.start == 0 and not entry.decodes for entry in plan)]
    sizes = {sum(map(tokens, plan)) for plan in begin}
    assert sizes >= {1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 768, 1023, 1024, 4095, 4096}
    going_on = [[e for e in plan if e.start and not e.decodes and tokens(e) > 1] for plan in plans]
    assert {(len(some), tokens(some[0])) for some in going_on if some} >= {(1, 2), (255, 2), (1, 100), (40, 100)}
    assert any(some[0].start % 64 for some in going_on if some)  # a prompt that did not fit a step
    mixed = [plan for plan in plans if any(e.decodes for e in plan) and not all(e.decodes for e in plan)]
    assert any(len(plan) > 2 for plan in mixed)
    params = {entry.begin.params for plan in plans for entry in plan if entry.begin is not None}
    assert {p.temperature > 0 for p in params} == {True, False}
    ids = {token for plan in plans for entry in plan for token in entry.ids or ()}
    assert min(ids) >= 0
    assert max(ids) < 1000


def test_a_prompt_longer_than_a_step_leaves_a_step_without_a_draw():
    plans, _ = recorded(max_seq_len=32768)
    assert any(sum(map(tokens, plan)) == 4096 and plan[0].draw is None for plan in plans)


@pytest.mark.parametrize("pages", [2, 3, 10, 100])
@pytest.mark.parametrize("max_seq_len", [2, 3, 63, 64, 65, 66, 67, 68, 130, 5000])
def test_no_request_is_too_long_for_context_or_cache(pages, max_seq_len):
    plans, engine = recorded(pages, max_seq_len)
    assert plans
    assert engine.scheduler.counts == Counts()
    check_empty(engine)


def test_where_no_request_has_a_place_nothing_is_computed():
    assert recorded(pages=1)[0] == recorded(max_seq_len=1)[0] == []


@pytest.fixture(scope="module")
def rich():
    return rich_decoder("sparse")


def cold(runner, *, ahead=1, **limits):
    """An engine over a runner that has its limits."""
    engine = tiny_engine(runner, pages=runner.about.pages, ahead=ahead, **limits)
    engine.scheduler.longest, engine.scheduler.vocab_size = runner.about.max_seq_len, runner.about.vocab_size
    return engine


@pytest.mark.parametrize(
    ("pages", "max_seq_len", "ahead", "deterministic"),
    [
        (7, 320, 1, False),
        (PAGES, 66, 1, True),
        pytest.param(PAGES, 320, 0, False, marks=pytest.mark.slow),
        pytest.param(2, 320, 0, True, marks=pytest.mark.slow),
    ],
)
def test_nothing_stays_of_it(rich, pages, max_seq_len, ahead, deterministic):
    runner = rich_runner(rich, pages=pages, max_seq_len=max_seq_len, deterministic=deterministic)
    engine = cold(runner, ahead=ahead, slots=8, budget=128)
    warm_up(engine, adapters=2)
    check_empty(engine)
    assert engine.scheduler.counts == Counts()
    assert not engine.scheduler.pool._content
    prompt = [*range(1, 60)]
    wishes = [Wish(prompt, 4, SamplingParams(logprobs=1)), Wish(prompt, 4, SamplingParams(temperature=1.0, seed=1))]
    fresh = rich_runner(rich, pages=pages, max_seq_len=max_seq_len, deterministic=deterministic)
    for request, single in zip(answers(engine, wishes), alone(fresh, wishes), strict=True):
        check_against(request, single)
        assert request.cached == 0


def test_requests_of_all_kinds_get_the_same_answers_afterwards(runner, singles):
    wishes, expected = singles
    engine = cold(runner)
    warm_up(engine)
    for request, single in zip(answers(engine, wishes), expected, strict=True):
        check_against(request, single)
    assert engine.scheduler.counts.prompt_tokens == sum(len(wish.ids) for wish in wishes)


def test_requests_that_come_meanwhile_are_answered_and_alone_are_counted(runner):
    wishes = random_wishes(random.Random(3), 12)
    expected = alone(runner, wishes)
    engine = cold(runner)
    early = engine.add(wishes[0].request())
    engine.step()
    found, warmed = [], threading.Event()

    def ask():
        while not warmed.is_set() or len(found) < 2:
            requests = [engine.add(wish.request()) for wish in wishes[1:]]
            while not all(request.finished for request in requests):
                engine.step()
            found.append(requests)

    asking = threading.Thread(target=ask)
    asking.start()
    warm_up(engine)
    warmed.set()
    asking.join(60)
    assert not asking.is_alive()
    for requests in found:
        for request, single in zip([early, *requests], expected, strict=True):
            check_against(request, single)
    mine = [early, *(request for requests in found for request in requests)]
    counts = engine.scheduler.counts
    assert counts.prompt_tokens == sum(request.prompt_length for request in mine)
    assert counts.drawn_tokens == sum(len(written(request)) for request in mine)
    assert counts.cached_tokens == sum(request.cached for request in mine)
    assert counts.put_back == sum(request.put_back for request in mine)
    check_empty(engine)


@pytest.mark.parametrize("step", [1, 2, 50])
def test_a_step_that_fails_ends_it_and_the_engine_is_empty(step):
    about = About(2000, max_running=256, step_tokens=4096, on_cpu=False, max_seq_len=2048, vocab_size=1000)
    engine = Engine.of(Recorder(fails_at=step), about)
    with pytest.raises(RankError, match="a rank is gone"):
        warm_up(engine)
    check_empty(engine)
    assert engine.scheduler.counts == Counts()
    warm_up(engine)


def test_closed_meanwhile_it_does_not_go_on():
    scheduler = Scheduler(PagePool(9), 4, 128)
    engine = Engine(scheduler, Recorder())
    plan = engine.executor.submit

    def close(planned):
        handle = plan(planned)
        scheduler.fail(RankError("closed"))
        engine._under_way.clear()
        return type("Handle", (), {"result": lambda self: (scheduler._steps.append([]), handle.result())[1]})()

    engine.executor.submit = close
    with pytest.raises(RankError, match="closed"):
        engine.rehearse([Sequence([1, 2], SamplingParams(), 3)], [Sequence([1, 2], SamplingParams(), 3)])
    assert len(engine.executor.plans) == 1


def test_a_cpu_compiles_nothing_and_a_gpu_does(rich):
    runner = tiny_runner(rich)
    assert not Engine.of(LocalExecutor(runner), runner.about).compiles
    assert Engine.of(Recorder(), runner.about._replace(on_cpu=False)).compiles


def test_the_rounds_are_few_and_say_what_they_are():
    engine = Engine.of(Recorder(), About(2000, 256, 4096, on_cpu=False, max_seq_len=2048, vocab_size=1000))
    whats = [one.what for one in rounds(engine.scheduler, 1)]
    assert len(whats) == len(set(whats)) < 180
