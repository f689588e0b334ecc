"""The mode in which a request's bits depend on nothing but the request: on a CPU, in bf16 and fp32."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers.examples import examples
from helpers.traffic import (
    PAGES,
    Traffic,
    Wish,
    alone,
    answers,
    check_against,
    check_empty,
    random_wishes,
    rich_decoder,
    rich_runner,
    step_to_the_end,
    tiny_engine,
    with_adapters_and_images,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.engine.deterministic import check_deterministic
from accessory.engine.sampling_params import SamplingParams
from accessory.errors import InputError
from accessory.ops import dispatch

EXACT = 0.0


@pytest.fixture(
    scope="module",
    params=[
        ("sparse", torch.bfloat16),
        ("base", torch.float32),
        pytest.param(("int8", torch.bfloat16), marks=pytest.mark.slow),
        pytest.param(("sparse", torch.float32), marks=pytest.mark.slow),
        pytest.param(("base", torch.bfloat16), marks=pytest.mark.slow),
        pytest.param(("int8", torch.float32), marks=pytest.mark.slow),
    ],
    ids=lambda p: f"{p[0]}-{p[1]}".replace("torch.", ""),
)
def fixed(request):
    """A runner in the mode, wishes of which each asks for log-probabilities, and what each gets alone."""
    kind, dtype = request.param
    runner, r = rich_runner(rich_decoder(kind, dtype), deterministic=True), random.Random(3)
    wishes = [
        w._replace(params=replace(w.params, logprobs=2)) for w in with_adapters_and_images(r, random_wishes(r, 16))
    ]
    return runner, wishes, alone(runner, wishes)


@settings(max_examples=examples(4))
@given(st.integers(0, 2**32), st.integers(0, 1))
def test_bits_do_not_depend_on_what_runs_beside(fixed, seed, ahead):
    """Late arrivals, any order, prompts cut anywhere, shared beginnings, adapters and images beside others."""
    (runner, wishes, singles), r = fixed, random.Random(seed)
    slots, budget = r.randint(1, 12), r.choice([1, 13, 64, 200, 512])
    engine = tiny_engine(runner, pages=r.choice([7, 12, PAGES]), slots=slots, budget=budget, ahead=ahead)
    for number, request in Traffic(engine, wishes, r).run(8):
        check_against(request, singles[number], EXACT)
    assert engine.scheduler.counts.put_back == 0
    step_to_the_end(engine)
    check_empty(engine)


def test_a_prompt_has_the_same_bits_however_it_is_cut(fixed):
    runner, _, _ = fixed
    r = random.Random(5)
    wish = Wish([1, *(r.randrange(97) for _ in range(99))], 3, SamplingParams(logprobs=3, prompt_logprobs=3))
    found = [answers(tiny_engine(runner, budget=budget), [wish])[0] for budget in (512, 100, 77, 64, 2, 1)]
    for request in found[1:]:
        check_against(request, found[0], EXACT)


def test_without_the_mode_bits_do_depend(fixed):
    """Else the tests above would show nothing."""
    runner, wishes, _ = fixed
    plain = rich_runner(runner.decoder)
    plain._see = runner._see
    wishes = wishes[:6]
    together = answers(tiny_engine(plain, slots=12, budget=200), wishes)
    singles = alone(plain, wishes)
    drawn = [[draw.logprob for draw in request.drawn] for request in (*together, *singles)]
    assert drawn[: len(wishes)] != drawn[len(wishes) :]


@pytest.mark.parametrize(
    ("triton", "capability", "fp8", "refused"),
    [
        (True, (8, 0), False, None),
        (False, (9, 0), False, "--deterministic: on a GPU it needs "),
        (True, (7, 5), False, "--deterministic: it needs a GPU of compute capability 8.0, but card has 7.5"),
        (True, (8, 0), True, "--deterministic: it needs a GPU of compute capability 8.9 for keys and values in fp8"),
    ],
)
def test_a_gpu_without_such_kernels_is_refused(triton, capability, fp8, refused, monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: triton)
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(InputError) if refused else nullcontext() as error:
        check_deterministic(torch.device("cuda"), torch.bfloat16, fp8, "--deterministic")
    if refused:
        assert str(error.value).startswith(refused)
