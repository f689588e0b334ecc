"""What goes wrong in an engine ends the requests that it must end, and no other."""

from __future__ import annotations

import pytest
import torch
from helpers.traffic import (
    PAGES,
    Wish,
    alone,
    answers,
    check_against,
    check_empty,
    log_softmax_of,
    step_to_the_end,
    tiny_decoder,
    tiny_engine,
    tiny_runner,
    written,
)

from accessory.engine.engine import Engine
from accessory.engine.executor import LocalExecutor
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.step import Step
from accessory.errors import BusyError, InputError, NonFiniteError


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_their_request_only(temperature, ahead):
    decoder = tiny_decoder("sparse")
    decoder.tok_embeddings.weight[96] = torch.nan
    runner = tiny_runner(decoder, vocab_size=96)  # no answer has the token 96
    params = SamplingParams(temperature=temperature, seed=1, top_p=0.9)
    good = [Wish([1, *range(n)], 30, params) for n in (3, 70, 40)]
    bad = Wish([1, 2, 96, 4], 30, params)
    engine = tiny_engine(runner, ahead=ahead, budget=40)
    requests = answers(engine, [good[0], bad, good[1], bad, good[2]])
    for n in (1, 3):
        assert requests[n].finished == "error"
        assert isinstance(requests[n].error, NonFiniteError)
        assert not requests[n].drawn
    expected = alone(runner, good)
    for n, single in zip((0, 2, 4), expected, strict=True):
        check_against(requests[n], single)
    check_empty(engine)


def test_a_request_longer_than_the_pool_is_refused(runner):
    engine = tiny_engine(runner, pages=4)
    with pytest.raises(InputError, match=r"^prompt: 190 tokens and an answer of 3 need 4 pages of 64[^\n]*has 3$"):
        engine.add(Wish([1] * 190, 3).request())
    assert answers(engine, [Wish([1] * 190, 2)])[0].finished == "length"
    check_empty(engine)


def test_a_request_longer_than_the_context_is_refused_and_the_others_go_on(runner):
    """Although the cache has room for it: no page table would."""
    engine = Engine.of(LocalExecutor(runner), runner.about)
    other = engine.add(Wish([1, 5, 9], 20).request())
    engine.step()
    with pytest.raises(InputError, match=r"^prompt: 300 tokens and an answer of 21 are 321, but max_seq_len is 320$"):
        engine.add(Wish([1] * 300, 21).request())
    longest = engine.add(Wish([1] * 300, 20).request())
    step_to_the_end(engine)
    assert [other.finished, longest.finished] == ["length", "length"]
    check_empty(engine)


class Grammar:
    """A mask that allows all tokens, and raises after so many tokens of the answer."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, answer: list[int]) -> bytes | None:
        if len(answer) >= self.after:
            raise KeyError("no such rule")
        return None


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("slots", [32, 2])
def test_a_mask_that_raises_ends_its_request_only(runner, singles, ahead, slots):
    """At the first token, in the middle of an answer, and after another sequence was put back for it."""
    wishes, expected = singles
    engine = tiny_engine(runner, pages=8, slots=slots, budget=50, whole=False, ahead=ahead)
    good, bad = [], []
    for n, wish in enumerate(wishes[:16]):
        request = Wish([1, n, *range(n)], 20).request()
        request.mask = Grammar(after=(0, 0, 1, 7)[n % 4])
        bad.append(engine.add(request))
        good.append(engine.add(wish.request()))
    step_to_the_end(engine)
    for n, request in enumerate(bad):
        assert (request.finished, str(request.error)) == ("error", "'no such rule'")
        assert request.error.__traceback__ is None
        assert len(written(request)) == (0, 0, 1, 7)[n % 4]
    for request, single in zip(good, expected, strict=False):
        check_against(request, single)
    check_empty(engine)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_mask_of_the_wrong_length_ends_its_request_only(runner, ahead):
    """One that is too short is an error of its request; of one that is longer, the end is not read."""
    engine = Engine.of(LocalExecutor(runner), runner.about)
    engine.executor.ahead = ahead
    need = -(-runner.about.vocab_size // 8)
    lengths = (need, 0, need - 1, need + 5, 1)
    expected = engine.add(Wish([1, 5, 9], 6).request())
    step_to_the_end(engine)
    requests = []
    for length in lengths:
        request = Wish([1, 5, 9], 6).request()
        request.mask = lambda answer, length=length: b"\xff" * length
        requests.append(engine.add(request))
    step_to_the_end(engine)
    for request, length in zip(requests, lengths, strict=True):
        assert request.finished == ("length" if length >= need else "error")
        if length >= need:
            assert written(request) == written(expected)
        else:
            assert f"has {length} bytes, but" in str(request.error)
    check_empty(engine)


def test_masks_that_raise_leave_no_request_waiting(runner):
    """The step in which all running sequences end begins the waiting ones."""
    engine = tiny_engine(runner, slots=2)
    requests = [Wish([1, n], 3).request() for n in range(7)]
    for request in requests[:6]:
        request.mask = Grammar(after=0)
    for request in requests:
        engine.add(request)
    step_to_the_end(engine)
    assert [request.finished for request in requests] == ["error"] * 6 + ["length"]
    check_empty(engine)


@pytest.mark.slow
def test_of_ten_thousand_requests_those_that_may_not_wait_are_refused_and_the_others_answered(runner):
    wishes = [Wish([1, n % 7], 1) for n in range(10_000)]
    expected = [written(request) for request in alone(runner, wishes[:7])]
    engine = tiny_engine(runner)
    accepted, refused = [], []
    for wish in wishes:
        try:
            accepted.append(engine.add(wish.request()))
        except BusyError as error:
            refused.append(str(error))
    assert refused == ["busy: 8,192 requests wait already, and 8,192 may; ask again later"] * 1808
    assert engine.scheduler.pool.free == PAGES - 1
    engine.step()
    engine.add(wishes[0].request())  # there is room again
    step_to_the_end(engine)
    assert all(request.finished == "length" for request in accepted)
    assert [written(request) for request in accepted] == [expected[n % 7] for n in range(8192)]
    check_empty(engine)


def test_those_that_were_put_back_may_wait_beside_the_most_that_may(runner, singles):
    wishes, expected = singles
    engine = tiny_engine(runner, pages=8, slots=8, budget=50, whole=False)
    engine.scheduler.max_waiting = 2
    requests = []
    for wish in wishes:
        while len(engine.scheduler.waiting) >= 2:
            engine.step()
        requests.append(engine.add(wish.request()))
    step_to_the_end(engine)
    assert engine.scheduler.counts.put_back > 3
    for request, single in zip(requests, expected, strict=True):
        check_against(request, single)
    check_empty(engine)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("when", ["submitted", "awaited"])
def test_an_error_of_the_runner_ends_all_requests_and_no_later_one(runner, singles, monkeypatch, when, ahead):
    wishes, expected = singles
    engine = tiny_engine(runner, slots=3, budget=100, ahead=ahead)
    requests = [engine.add(wish.request()) for wish in wishes[:6]]
    for _ in range(3):
        engine.step()
    ended = [request for request in requests if request.finished]

    def broken(*_):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        patched.setattr(*((runner, "run") if when == "submitted" else (Step, "result")), broken)
        with pytest.raises(RuntimeError, match="out of luck"):
            step_to_the_end(engine)
    for request in requests:
        assert request in ended or str(request.error) == "out of luck"
    check_empty(engine)
    for pool in (runner.cache.k, runner.cache.v):  # what the pages held is lost
        pool.fill_(torch.nan)
    for request, single in zip(answers(engine, wishes[:16]), expected, strict=False):
        check_against(request, single)
    check_empty(engine)


@pytest.mark.parametrize("ahead", [0, 1])
def test_scoring_comes_between_steps(runner, oracle, singles, ahead):
    """An executor's answers come in order, so the steps under way are heard first."""
    wishes, expected = singles
    engine = tiny_engine(runner, ahead=ahead, budget=100)
    asked = []

    class InOrder(LocalExecutor):
        def submit(self, plan):
            step = super().submit(plan)
            asked.append(step)
            done, result = step, step.result

            def in_turn():
                assert asked.pop(0) is done
                return result()

            step.result = in_turn
            return step

        def score(self, rows, images):
            assert not asked
            return super().score(rows, images)

    engine.executor = InOrder(runner)
    engine.executor.ahead = ahead
    requests = [engine.add(wish.request()) for wish in wishes[:5]]
    for _ in range(4):
        engine.step()
        (logits_TV,) = engine.score([[1, 5, 9]], [None])
        torch.testing.assert_close(logits_TV.log_softmax(-1), log_softmax_of(oracle, [1, 5, 9]), atol=1e-4, rtol=0)
    step_to_the_end(engine)
    for request, single in zip(requests, expected, strict=False):
        check_against(request, single)


def test_an_error_while_scoring_ends_all_requests(runner, monkeypatch):
    """Ranks that fail are started anew. What their pages held is lost."""
    engine = tiny_engine(runner)
    request = engine.add(Wish([1] * 100).request())
    engine.step()
    monkeypatch.setattr(runner, "score", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        engine.score([[1]], [None])
    assert isinstance(request.error, ZeroDivisionError)
    assert answers(engine, [Wish([1] * 100)])[0].cached == 0
    check_empty(engine)


def test_an_engine_has_what_its_runner_says(runner):
    engine = Engine.of(LocalExecutor(runner), runner.about)
    assert engine.scheduler.pool.pages == PAGES
    assert (engine.scheduler.max_running, engine.scheduler.budget, engine.scheduler.whole) == (32, 512, True)
    assert engine.scheduler.max_waiting == 8192
    assert Engine.of(LocalExecutor(runner), runner.about, max_waiting=3).scheduler.max_waiting == 3


def test_the_callers_grad_mode_is_left_alone(runner):
    answers(tiny_engine(runner), [Wish([1], 3)])
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
