"""`MetaModel.answers`: requests without end, each with its own settings, and an error is the answer to one of them."""

from __future__ import annotations

from contextlib import suppress

import pytest
from helpers.traffic import check_empty

from accessory.engine.engine import Engine
from accessory.engine.executor import LocalExecutor
from accessory.engine.sampling_params import SamplingParams
from accessory.errors import InputError, NonFiniteError
from accessory.model import text_model
from accessory.model.writing import TextRequest

PROMPT = "The best programming language in the world is"


@pytest.fixture
def narrow(model, monkeypatch):
    """The model with a cache of two pages, 128 tokens."""
    runner = model.runner(pages=3)
    monkeypatch.setattr(model, "_made", Engine.of(LocalExecutor(runner), runner.about))
    return model


def test_each_gets_what_it_gets_alone_and_an_error_is_an_answer(narrow):
    hot = SamplingParams(temperature=0.4, seed=5)
    long = [1, *range(300, 440)]  # needs three pages
    asked = [
        TextRequest(PROMPT, max_gen_len=12),
        TextRequest("", max_gen_len=4, name="in.txt:2"),
        TextRequest("One", max_gen_len=3, params=hot),
        TextRequest(long, max_gen_len=4),
        InputError("messages: the list is empty"),
        TextRequest(PROMPT, max_gen_len=400),
        TextRequest("One", max_gen_len=5, params=hot),
        TextRequest("Two", image="cat.png"),
        TextRequest(PROMPT, max_gen_len=4, params=SamplingParams(logit_bias={40000: 1})),
    ]
    answers = dict(narrow.answers(iter(asked)))
    assert sorted(answers) == list(range(len(asked)))
    for n, alone in (
        (0, narrow.generate([PROMPT], max_gen_len=12)),
        (2, narrow.generate(["One"], max_gen_len=3, temperature=0.4, seed=5)),
        (6, narrow.generate(["One"], max_gen_len=5, temperature=0.4, seed=5)),
    ):
        assert ([answers[n].text], answers[n].error) == (alone, None)
    for n, said in {
        1: "in.txt:2: is empty; give at least one character",
        3: "prompt: 141 tokens and an answer of 4 need 3 pages",
        4: "messages: the list is empty",
        5: "max_gen_len: got 400",
        7: "prompt: has an image, but this model is text only",
        8: "logit_bias: got the token 40000",
    }.items():
        assert (answers[n].finish_reason, answers[n].text) == ("error", "")
        assert isinstance(answers[n].error, InputError)
        assert said in str(answers[n].error)
    check_empty(narrow.engine())


def test_a_request_that_is_not_finite_leaves_the_others(model, monkeypatch):
    """The second request's first draw is told as one of no finite logits."""
    commit = model.engine().scheduler.commit

    def spoilt(result):
        if len(result.draws) == 3:
            result = result._replace(draws=[result.draws[0], None, result.draws[2]])
            monkeypatch.undo()
        commit(result)

    monkeypatch.setattr(model.engine().scheduler, "commit", spoilt)
    answers = dict(model.answers(TextRequest(prompt, max_gen_len=4) for prompt in ("One", "Two", "Three")))
    assert [type(answers[n].error) for n in range(3)] == [type(None), NonFiniteError, type(None)]
    assert [answers[n].text for n in (0, 2)] == model.generate(["One", "Three"], max_gen_len=4)


def test_requests_are_taken_as_others_end(model, monkeypatch):
    """At most AT_ONCE are in the engine, and at most AHEAD have begun behind the oldest one that goes on."""
    monkeypatch.setattr(text_model, "AT_ONCE", 4)
    monkeypatch.setattr(text_model, "AHEAD", 6)
    scheduler, most, taken, ended, ahead = model.engine().scheduler, 0, 0, set(), 0

    def requests():
        nonlocal taken, most, ahead
        for n in range(40):
            taken += 1
            assert taken - len(ended) <= 4
            oldest = next(i for i in range(41) if i not in ended)
            ahead = max(ahead, taken - oldest)
            most = max(most, len(scheduler.waiting) + len(scheduler.running))
            yield TextRequest([1, 300 + n], max_gen_len=30 if n % 10 == 0 else 1 + n % 3)

    order = []
    for number, answer in model.answers(requests()):
        assert answer.error is None
        order.append(number)
        ended.add(number)
    assert sorted(order) == list(range(40))
    assert order != sorted(order)
    assert (most, ahead) == (3, 6)  # the fourth was just being taken


@pytest.mark.parametrize("leave", ["close", "cancel", "an iterator that fails"])
def test_who_leaves_frees_the_pages(model, leave):
    def requests():
        yield from (TextRequest(PROMPT, max_gen_len=2 + 60 * n) for n in range(4))
        if leave == "an iterator that fails":
            raise ValueError("no more")

    begun = []
    answers = model.answers(requests(), lambda: leave == "cancel" and len(begun) > 4, begun.append)
    if leave == "close":
        assert next(answers)[0] == 0
        answers.close()
    else:
        with suppress(ValueError):
            assert [number for number, _ in answers] == [0]
    check_empty(model.engine())


def test_on_step_tells_every_token_once(model):
    told = []
    answers = dict(model.answers([TextRequest(PROMPT, max_gen_len=n) for n in (3, 7)], on_step=told.append))
    assert sum(told) == sum(len(answer.token_ids) for answer in answers.values()) == 10


def test_complete_refuses_what_the_cache_cannot_hold_before_a_step(narrow, monkeypatch):
    """Also where the prompt would have to wait until others have ended."""
    monkeypatch.setattr(text_model, "AT_ONCE", 1)
    monkeypatch.setattr("accessory.nn.decoder.Decoder.forward", None)
    with pytest.raises(
        InputError, match="141 tokens and an answer of 4 need 3 pages of 64 tokens, but the cache has 2"
    ):
        narrow.complete(["One", "Two", [1, *range(300, 440)]], max_gen_len=4)
    check_empty(narrow.engine())
