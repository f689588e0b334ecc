"""The engine on tiny networks, against transformers and against each request alone."""

from __future__ import annotations

import os
import random
import threading

import psutil
import pytest
import torch
from helpers.examples import examples
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

from accessory.engine.sampling_params import SamplingParams
from accessory.limits import PAGE_SIZE

PROMPTS = [[1, 5, 9], [1], [1, 80, 3, 44, 2, 61, 17, 30, 29, 28, 27] * 7]


@pytest.fixture(
    scope="module",
    params=[pytest.param("base", marks=pytest.mark.slow), pytest.param("sparse", marks=pytest.mark.slow), "int8"],
)
def rich(request):
    return rich_runner(rich_decoder(request.param))


@pytest.fixture(scope="module")
def rich_singles(rich):
    r = random.Random(2)
    wishes = with_adapters_and_images(r, random_wishes(r, 20))
    assert {wish.adapter for wish in wishes} == {-1, 0, 1}
    assert {len(wish.images) for wish in wishes} == {0, 1}
    return wishes, alone(rich, wishes)


@pytest.fixture(scope="module")
def theirs(oracle):
    """80 tokens after each prompt, by transformers."""
    how = {"max_new_tokens": 80, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [oracle.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist() for prompt in PROMPTS]


# ----------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("budget", [512, 7])
@pytest.mark.parametrize("runner", ["base", "sparse"], indirect=True)
def test_greedy_tokens_are_those_of_transformers(runner, theirs, budget, ahead):
    requests = answers(tiny_engine(runner, budget=budget, ahead=ahead), [Wish(prompt, 80) for prompt in PROMPTS])
    assert [written(request) for request in requests] == theirs
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


@settings(max_examples=examples(15))
@given(st.data())
def test_each_request_gets_what_it_gets_alone(runner, singles, data):
    """Late arrivals, bursts, chunks, a pool that is too small, shared beginnings, callers that leave."""
    random_traffic(runner, singles, data)


@settings(max_examples=examples(8))
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
    wishes = [Wish([1, *range(3, 3 + n)]) for n in range(0, 40, 2)]
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


@pytest.mark.parametrize("ahead", [0, 1])
def test_requests_come_and_leave_while_a_step_runs(runner, ahead, monkeypatch):
    engine = tiny_engine(runner, ahead=ahead)
    stays, leaves, comes = Wish([1, 5, 9], 6), Wish([1, 7], 6), Wish([1, 5, 8, 3], 6)
    begun, goes_on, submit = threading.Event(), threading.Event(), engine.executor.submit

    def stuck(plan):
        begun.set()
        assert goes_on.wait(20)
        return submit(plan)

    monkeypatch.setattr(engine.executor, "submit", stuck)
    first, second = engine.add(stays.request()), engine.add(leaves.request())
    steps = threading.Thread(target=step_to_the_end, args=(engine,))
    steps.start()
    assert begun.wait(20)
    engine.finish(second)
    third = engine.add(comes.request())
    assert second.finished == "abort"
    assert not goes_on.is_set()
    goes_on.set()
    steps.join(20)
    assert not steps.is_alive()
    for request, expected in zip((first, third), alone(runner, [stays, comes]), strict=True):
        check_against(request, expected)
    assert not second.drawn
    check_empty(engine)


# ----------------------------------------------------------------------------- for long


@pytest.mark.parametrize(("requests", "kinds"), [(100, 15), pytest.param(20_000, 120, marks=pytest.mark.long)])
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
    assert engine.scheduler.counts.put_back >= max(1, requests // 300)
    assert engine.scheduler.counts.cached_tokens > requests * 10
