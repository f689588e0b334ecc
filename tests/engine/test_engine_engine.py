"""The engine on tiny networks, against transformers and against each request alone."""

from __future__ import annotations

import os
import random

import psutil
import pytest
import torch
from helpers.random_models import canonical_from_hf, decoder_from_canonical, hf_mixtral
from helpers.traffic import (
    ARGS,
    PAGES,
    Traffic,
    Wish,
    alone,
    answers,
    check_against,
    check_empty,
    log_softmax_of,
    random_wishes,
    rich_decoder,
    rich_runner,
    step_to_the_end,
    tiny_decoder,
    tiny_engine,
    tiny_runner,
    with_adapters_and_images,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.engine.engine import Engine
from accessory.engine.executor import LocalExecutor
from accessory.engine.runner import Step
from accessory.engine.sampling_params import SamplingParams
from accessory.errors import BusyError, InputError, NonFiniteError
from accessory.limits import PAGE_SIZE

IMPLEMENTATIONS = ["base", "sparse"]
PROMPTS = [[1, 5, 9], [1], [1, 80, 3, 44, 2, 61, 17, 30, 29, 28, 27] * 7]


@pytest.fixture(scope="module")
def oracle():
    return hf_mixtral(ARGS, std=0.2)


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def runner(request):
    return tiny_runner(tiny_decoder(request.param))


@pytest.fixture(scope="module")
def singles(runner):
    """Wishes of all kinds, and what each gets alone."""
    wishes = random_wishes(random.Random(1), 48)
    return wishes, alone(runner, wishes)


@pytest.fixture(scope="module", params=[*IMPLEMENTATIONS, "int8"])
def rich(request):
    return rich_runner(rich_decoder(request.param))


@pytest.fixture(scope="module")
def rich_singles(rich):
    r = random.Random(2)
    wishes = with_adapters_and_images(r, random_wishes(r, 32))
    assert {wish.adapter for wish in wishes} == {-1, 0, 1}
    assert {len(wish.images) for wish in wishes} == {0, 1}
    return wishes, alone(rich, wishes)


def theirs(oracle, prompt, n):
    ids = oracle.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    return ids[0, len(prompt) :].tolist()


# ----------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("budget", [512, 7])
def test_greedy_tokens_are_those_of_transformers(runner, oracle, budget, ahead):
    requests = answers(tiny_engine(runner, budget=budget, ahead=ahead), [Wish(prompt, 80) for prompt in PROMPTS])
    assert [written(request) for request in requests] == [theirs(oracle, prompt, 80) for prompt in PROMPTS]
    assert {request.finished for request in requests} == {"length"}


@pytest.mark.parametrize("budget", [512, 5])
def test_log_probabilities_are_transformers_log_softmax(runner, oracle, budget):
    params = SamplingParams(temperature=0.8, seed=4, logprobs=3, prompt_logprobs=2)
    for request in answers(tiny_engine(runner, budget=budget), [Wish(ids, 12, params) for ids in PROMPTS]):
        logp_TV = log_softmax_of(oracle, request.ids)
        known = [*request.prompt_logprobs, *request.drawn]
        assert [draw.token for draw in known] == request.ids[1:]
        for n, draw in enumerate(known):
            best = logp_TV[n].topk(2 if n < len(request.prompt_logprobs) else 3)
            assert draw.logprob == pytest.approx(float(logp_TV[n, draw.token]), abs=1e-4)
            assert list(draw.top) == best.indices.tolist()
            assert list(draw.top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)


@settings(max_examples=15)
@given(st.data())
def test_each_request_gets_what_it_gets_alone(runner, singles, data):
    """Late arrivals, bursts, chunks, a pool that is too small, shared beginnings, callers that leave."""
    random_traffic(runner, singles, data)


@settings(max_examples=8)
@given(st.data())
def test_with_adapters_images_and_quantised_weights_too(rich, rich_singles, data):
    random_traffic(rich, rich_singles, data)


def random_traffic(runner, singles, data):
    seed, ahead = data.draw(st.integers(0, 2**32)), data.draw(st.integers(0, 1))
    r, (wishes, expected) = random.Random(seed), singles
    engine = tiny_engine(
        runner,
        pages=r.choice([7, 8, 12, PAGES]),  # the longest request takes six
        slots=r.randint(1, 12),
        budget=r.choice([1, 13, 64, 200, 512]),
        ahead=ahead,
        whole=r.random() < 0.5,
    )
    traffic = Traffic(engine, wishes, r)
    for number, request in traffic.run(12):
        check_against(request, expected[number])
    step_to_the_end(engine)  # what was under way for callers that had left
    check_empty(engine)


def test_the_traffic_of_these_tests_chunks_shares_and_puts_back(runner, singles):
    """Otherwise the tests of random traffic would show less than they say."""
    wishes, expected = singles
    engine = tiny_engine(runner, pages=8, slots=8, budget=50, whole=False)
    requests = answers(engine, wishes)
    for request, single in zip(requests, expected, strict=True):
        check_against(request, single)
    assert engine.scheduler.counts.put_back > 3
    assert engine.scheduler.counts.cached_tokens >= 5 * PAGE_SIZE
    assert any(request.finished == "stop" for request in requests)


def test_in_bf16_a_batch_changes_a_prompts_tokens_only_at_near_ties():
    # Small weights: the router's margins are then as wide as a trained network's, and only rounding is left to differ.
    tensors = canonical_from_hf(hf_mixtral(ARGS, std=0.05))
    decoder = decoder_from_canonical(ARGS, "sparse", tensors).requires_grad_(False).cast(torch.bfloat16)
    runner = tiny_runner(decoder)
    wishes = [Wish([1, *range(3, 3 + n)]) for n in range(40)]
    together, differ = answers(tiny_engine(runner, budget=60), wishes), 0
    for request, single in zip(together, alone(runner, wishes), strict=True):
        if request.ids == single.ids:
            continue
        differ += 1
        same = next(n for n, pair in enumerate(zip(request.ids, single.ids, strict=True)) if pair[0] != pair[1])
        logits_V = decoder(torch.tensor([single.ids[:same]])).logits[0, -1].float()
        gap = (logits_V[single.ids[same]] - logits_V[request.ids[same]]).abs()
        assert gap <= 2 * 2**-8 * logits_V.abs().max(), (single.ids, gap)  # two roundings to bf16's 8 bits
    assert differ < len(wishes) // 2


def test_a_seed_repeats_and_copies_differ(runner):
    wishes = [Wish([1, 5], 20, SamplingParams(temperature=1.0, seed=s, copy=c)) for s, c in ((1, 0), (1, 1), (2, 0))]
    first, again = (list(map(written, answers(tiny_engine(runner), wishes))) for _ in range(2))
    assert first == again
    assert len({tuple(ids) for ids in first}) == 3


# ----------------------------------------------------------------------------- what goes wrong


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
    for request, single in zip(answers(engine, wishes), expected, strict=True):
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


# ----------------------------------------------------------------------------- for long


@pytest.mark.parametrize(("requests", "kinds"), [(300, 30), pytest.param(20_000, 120, marks=pytest.mark.long)])
def test_all_of_many_requests_are_answered_and_memory_stays_flat(requests, kinds):
    r = random.Random(7)
    runner = tiny_runner(tiny_decoder("sparse"))
    wishes = random_wishes(r, kinds)
    expected = alone(runner, wishes)
    engine = tiny_engine(runner, pages=10, slots=12, budget=150, ahead=1, whole=False)
    traffic, process, before = Traffic(engine, wishes, r), psutil.Process(os.getpid()), 0
    left = 0
    for n, (number, request) in enumerate(traffic.run(requests)):
        check_against(request, expected[number])
        left += written(request) != written(expected[number])
        if n == requests // 5:
            before = process.memory_info().rss
    assert process.memory_info().rss - before < 50 * 2**20
    assert left < requests // 4
    step_to_the_end(engine)
    check_empty(engine)
    assert engine.scheduler.counts.put_back >= requests // 300
    assert engine.scheduler.counts.cached_tokens > requests * 10
