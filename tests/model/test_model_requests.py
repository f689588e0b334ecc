"""What a call may ask of its answers: `SamplingParams`, log-probabilities, copies; and calls of several threads."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from helpers.traffic import check_empty, log_softmax_of

from accessory.engine.sampling_params import SamplingParams
from accessory.engine.sequence import Draw
from accessory.engine.sequence import Sequence as Request
from accessory.errors import InputError
from accessory.model.writing import Writing

PROMPT = "The best programming language in the world is"
N = 16


@pytest.fixture(scope="module")
def ids(model):
    return model.tokenizer.encode(PROMPT, bos=True)


def one(model, **params):
    (answer,) = model.complete([PROMPT], max_gen_len=N, params=SamplingParams(**params))
    return answer


def text_of(model, ids, tokens):
    return model.tokenizer.decode(tokens, after=ids)


def by_hand(oracle, ids, change):
    """Greedy tokens, each the largest of `change(logits, prompt, answer)`."""
    answer = []
    for _ in range(N):
        with torch.no_grad():
            logits_V = oracle(torch.tensor([ids + answer])).logits[0, -1]
        answer.append(int(change(logits_V, ids, answer).argmax()))
    return answer


@pytest.mark.parametrize("penalty", [1.5, 0.6])
def test_repetition_penalty_is_that_of_transformers(model, oracle, ids, penalty):
    theirs = oracle.generate(
        torch.tensor([ids]), max_new_tokens=N, do_sample=False, pad_token_id=0, repetition_penalty=penalty
    )[0, len(ids) :].tolist()
    assert model.generate([PROMPT], max_gen_len=N, repetition_penalty=penalty) == [text_of(model, ids, theirs)]
    assert theirs != one(model).token_ids or penalty > 1  # this network hardly repeats a token by itself


def penalised(presence=0.0, frequency=0.0):
    def change(logits_V, _, answer):
        logits_V = logits_V.clone()
        for token in set(answer):
            logits_V[token] -= presence + frequency * answer.count(token)
        return logits_V

    return change


def biased(bias):
    def change(logits_V, *_):
        return logits_V + torch.tensor([bias.get(n, 0.0) for n in range(len(logits_V))])

    return change


@pytest.mark.parametrize(
    ("given", "change"),
    [
        ({"presence_penalty": -2.0}, penalised(presence=-2.0)),
        ({"frequency_penalty": -1.0}, penalised(frequency=-1.0)),
        ({"presence_penalty": 0.5, "frequency_penalty": 2.0}, penalised(0.5, 2.0)),
        ({"logit_bias": {400: 2.5, 401: 2.0}}, biased({400: 2.5, 401: 2.0})),
        ({"logit_bias": {500: 100}}, biased({500: 100})),
    ],
)
def test_penalties_and_bias_change_the_logits_as_written(model, oracle, ids, given, change):
    expected = by_hand(oracle, ids, change)
    assert model.generate([PROMPT], max_gen_len=N, **given) == [text_of(model, ids, expected)]
    assert one(model, **given).token_ids == expected


@pytest.mark.parametrize("given", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}])
def test_narrow_choices_are_greedy(model, given):
    assert model.generate([PROMPT], max_gen_len=N, temperature=2.0, **given) == model.generate([PROMPT], max_gen_len=N)


def test_top_k_and_min_p_keep_what_they_say(model, oracle, ids):
    for given, keeps in (
        ({"top_k": 3, "top_p": 1.0}, lambda p, token: (p > p[token]).sum() < 3),
        ({"min_p": 0.3, "top_p": 1.0}, lambda p, token: p[token] >= 0.3 * p.max() - 1e-6),
    ):
        answers = model.complete([PROMPT] * 6, max_gen_len=N, params=SamplingParams(temperature=1.5, seed=2, **given))
        assert len({answer.text for answer in answers}) > 1
        for answer in answers:
            p_TV = (log_softmax_of(oracle, ids + answer.token_ids) / 1.5).softmax(-1)[len(ids) - 1 :]
            assert all(keeps(p_TV[n], token) for n, token in enumerate(answer.token_ids))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answers_log_probabilities_are_those_of_transformers(model, oracle, ids, temperature):
    answer = one(model, temperature=temperature, seed=1, logprobs=2, prompt_logprobs=0)
    logp_TV = log_softmax_of(oracle, ids + answer.token_ids)
    own = logp_TV[:-1].gather(1, torch.tensor(ids + answer.token_ids)[1:, None]).squeeze(1)
    assert answer.prompt_logprobs == pytest.approx(own[: len(ids) - 1].tolist(), abs=1e-4)
    assert answer.logprobs == pytest.approx(own[len(ids) - 1 :].tolist(), abs=1e-4)
    best = logp_TV[len(ids) - 1 : -1].topk(2)
    assert [list(top) for top in answer.top_logprobs] == best.indices.tolist()
    for top, values in zip(answer.top_logprobs, best.values.tolist(), strict=True):
        assert list(top.values()) == pytest.approx(values, abs=1e-4)
    assert (answer.prompt_tokens, answer.finish_reason) == (len(ids), "length")


def test_log_probabilities_come_only_where_they_are_asked_for(model):
    plain, tokens_only = one(model), one(model, logprobs=0)
    assert (plain.logprobs, plain.top_logprobs, plain.prompt_logprobs) == (None, None, None)
    assert (len(tokens_only.logprobs), tokens_only.top_logprobs) == (N, None)


def test_equal_prompts_of_a_call_with_a_seed_are_copies(model):
    # Not hotter: among thousands of equally likely tokens, the last bit of a logit could decide which one is drawn.
    call = {"max_gen_len": N, "temperature": 0.4, "seed": 5}
    texts = model.generate([PROMPT, "Another", PROMPT, PROMPT], **call)
    assert len(set(texts)) == 4
    assert model.generate([PROMPT, "Another", PROMPT, PROMPT], **call) == texts
    assert model.generate(["Another"], **call) == texts[1:2]
    assert model.generate([PROMPT, PROMPT], **call) == [texts[0], texts[2]]
    params = SamplingParams(temperature=0.4, seed=5, copy=2)
    assert model.complete([PROMPT], max_gen_len=N, params=params)[0].text == texts[3]


def test_a_second_call_finds_the_prompts_pages(model):
    long = [1, *range(300, 440)]
    first, second = (model.complete([long], max_gen_len=4)[0] for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 128)
    assert first.token_ids == second.token_ids


def test_what_sampling_refuses_is_one_error(model):
    for given, names in (({"top_k": -2}, "top_k"), ({"logit_bias": {32000: 1}}, "32000"), ({"min_p": 2}, "min_p")):
        with pytest.raises(InputError, match=names):
            model.generate([PROMPT], max_gen_len=4, **given)


def test_threads_stream_at_once_and_each_gets_its_text(model):
    prompts = [PROMPT, "Zwei Wörter", [1, *range(300, 440)], "One", PROMPT]
    call = {"max_gen_len": 20, "temperature": 0.3, "seed": 3}
    expected = [model.generate([prompt], **call)[0] for prompt in prompts]
    got: list[list[str]] = [[] for _ in prompts]
    together = threading.Barrier(len(prompts))

    def read(n):
        together.wait()
        for item in model.stream_generate(prompts[n], **call):
            got[n].append(item["text"])

    threads = [threading.Thread(target=read, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [texts[-1] for texts in got] == expected
    assert min(map(len, got)) > 1  # in pieces: how many depends on whose turn it is
    check_empty(model.engine())


def test_what_callers_raise_ends_their_own_requests_only(model):
    """A stream that is read, beside readers and functions of callers that raise."""
    expected = model.generate([PROMPT], max_gen_len=40)[0]
    stream = model.stream_generate(PROMPT, max_gen_len=40)
    next(stream)

    def out_of_luck(*_):
        raise RuntimeError("out of luck")

    for given in ({"on_step": out_of_luck}, {"cancelled": out_of_luck}):
        with pytest.raises(RuntimeError, match="out of luck"):
            model.generate(["A", "B"], max_gen_len=30, **given)
    with pytest.raises(RuntimeError, match="out of luck"):
        list(map(out_of_luck, model.stream_generate("A", max_gen_len=30)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accessory.data.detokenizer.StopScanner.push", out_of_luck)
        with pytest.raises(RuntimeError, match="out of luck"):
            model.generate(["A", "B"], max_gen_len=30)
    assert list(stream)[-1]["text"] == expected
    check_empty(model.engine())


def test_a_call_with_more_prompts_than_may_wait_is_answered(model, monkeypatch):
    monkeypatch.setattr("accessory.model.text_model.AT_ONCE", 3)
    monkeypatch.setattr(model.engine().scheduler, "max_waiting", 3)
    assert model.generate([PROMPT] * 10, max_gen_len=4) == model.generate([PROMPT], max_gen_len=4) * 10


def test_a_reader_that_leaves_or_cancels_frees_its_pages(model):
    stream = model.stream_generate(PROMPT, max_gen_len=60)
    next(stream)
    stream.close()
    check_empty(model.engine())
    calls = iter(range(100))
    answers = model.complete([PROMPT, "A"], max_gen_len=60, cancelled=lambda: next(calls) >= 5)
    assert [answer.finish_reason for answer in answers] == ["abort", "abort"]
    assert [len(answer.token_ids) for answer in answers] == [5, 5]
    items = list(model.stream_generate(PROMPT, max_gen_len=60, cancelled=lambda: next(calls) >= 20))
    assert [item["end_of_content"] for item in items] == [False] * (len(items) - 1) + [True]
    assert all(a["text"] != b["text"] for a, b in itertools.pairwise(items[:-1]))
    check_empty(model.engine())


def test_a_last_token_that_comes_while_an_answer_is_read_is_not_lost(model):
    """Another thread's step adds the last token, and then says that the request has ended."""
    tokens = model.tokenizer.encode("🦀", bos=False)
    assert len(tokens) > 2

    class Racing(Request):
        ended = None

        @property
        def finished(self):
            if self.ended is None and not self.drawn and hasattr(self, "drawn"):
                self.drawn.append(Draw(tokens[-1]))
                self.ended = "length"
            return self.ended

        @finished.setter
        def finished(self, value):
            self.ended = value

    request = Racing([1], SamplingParams(), 60)
    request.drawn.extend(Draw(token) for token in tokens[:-1])
    writing = Writing(request, model.tokenizer, [1], ())
    while writing.answer.finish_reason is None:
        writing.take(lambda _: None)
    assert writing.answer.text.strip() == "🦀"
    assert writing.answer.token_ids == tokens
