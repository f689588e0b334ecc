"""/v1/completions and the small routes, asked by the `openai` package and by hand."""

from __future__ import annotations

import asyncio

import openai
import pytest
import torch
from helpers.random_models import hf_mixtral
from helpers.serving import NAME, check_error
from helpers.sizes import SPEAKING
from helpers.traffic import log_softmax_of

PROMPT = "The best programming language in the world is"
N = 12
GREEDY = {"model": NAME, "temperature": 0, "max_tokens": N}


@pytest.fixture(scope="module")
def greedy(model):
    return model.generate([PROMPT], max_gen_len=N)[0]


@pytest.fixture(scope="module")
def ids(model):
    return model.tokenizer.encode(PROMPT, bos=True)


def text(server, prompt=PROMPT, **given):
    return server.openai.completions.create(prompt=prompt, **{**GREEDY, **given}).choices[0].text


def test_greedy_text_is_that_of_generate(server, greedy, ids):
    answer = server.openai.completions.create(prompt=PROMPT, **GREEDY)
    assert (answer.object, answer.model, answer.choices[0].text) == ("text_completion", NAME, greedy)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), N)
    assert answer.usage.total_tokens == len(ids) + N


def test_pieces_of_a_stream_joined_are_the_whole(server, greedy):
    stream = server.openai.completions.create(
        prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(piece.text for piece in pieces) == greedy
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len(pieces) > 2
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == N
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_async_client_gets_the_same(server, greedy):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            whole, stream = await asyncio.gather(
                client.completions.create(prompt=PROMPT, **GREEDY),
                client.completions.create(prompt=PROMPT, stream=True, **GREEDY),
            )
            return whole.choices[0].text, "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(ask()) == (greedy, greedy)


def test_prompts_are_texts_or_ids_one_or_several(server, model, greedy, ids):
    other = model.generate(["Another"], max_gen_len=N)[0]
    more = model.tokenizer.encode("Another", bos=True)
    for prompt, expected in (
        (ids, [greedy]),
        ([PROMPT], [greedy]),
        ([PROMPT, "Another"], [greedy, other]),
        ([ids, more], [greedy, other]),
    ):
        answer = server.openai.completions.create(prompt=prompt, **GREEDY)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))


def test_answers_of_n_copies_are_those_of_copies(server, model):
    call = {"prompt": [PROMPT, "Another"], "n": 3, "seed": 5, "temperature": 0.4, "top_p": 0.9, "max_tokens": N}
    answer = server.openai.completions.create(model=NAME, **call)
    expected = [
        copy
        for prompt in (PROMPT, "Another")
        for copy in model.generate([prompt] * 3, max_gen_len=N, temperature=0.4, top_p=0.9, seed=5)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert len(set(expected)) == 6
    texts = [""] * 6
    for chunk in server.openai.completions.create(model=NAME, stream=True, **call):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected
    assert answer.usage.prompt_tokens == sum(
        len(model.tokenizer.encode(prompt, bos=True)) for prompt in (PROMPT, "Another")
    )


def test_without_a_seed_copies_differ(server):
    answer = server.openai.completions.create(model=NAME, prompt=PROMPT, n=4, max_tokens=N)
    assert len({choice.text for choice in answer.choices}) == 4


@pytest.mark.parametrize(
    "given",
    [
        {"presence_penalty": -2.0},
        {"presence_penalty": 0.5, "frequency_penalty": 2.0},
        {"logit_bias": {400: 2.5, 401: 2.0}},
        {"repetition_penalty": 1.5},
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 2.0, "min_p": 1.0},
        {"temperature": 0.7, "seed": 3, "top_p": 0.8, "top_k": 20, "min_p": 0.01},
        {"ignore_eos": True, "logit_bias": {2: 100.0}},
        {"min_tokens": 5, "logit_bias": {2: 100.0}},
    ],
)
def test_settings_reach_the_draw(server, model, given):
    defaults = {"temperature": 0.0, "top_p": 1.0}
    own = {"logit_bias", "presence_penalty", "frequency_penalty", "seed", "temperature", "top_p"}
    extra = {name: value for name, value in given.items() if name not in own}
    call = {**GREEDY, "prompt": PROMPT, **{k: v for k, v in given.items() if k in own}}
    answer = server.openai.completions.create(**call, extra_body=extra)
    assert [answer.choices[0].text] == model.generate([PROMPT], max_gen_len=N, **{**defaults, **given})


def test_stops(server, model, greedy):
    stop = greedy[len(greedy) // 2 :][:3]
    expected = greedy[: greedy.index(stop)]
    several = [stop, "never one", "nor two", "nor three"]
    for given in (stop, several):
        answer = server.openai.completions.create(prompt=PROMPT, stop=given, **GREEDY)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
    stream = server.openai.completions.create(prompt=PROMPT, stop=several, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected
    check_error(server.post("/v1/completions", prompt=PROMPT, stop=["a", "b", "c", "d", "e"]), 400, "stop", "4")
    check_error(server.post("/v1/completions", prompt=PROMPT, stop=["a", ""]), 400, "stop", "empty")
    tokens = model.complete([PROMPT], max_gen_len=N)[0].token_ids
    answer = server.openai.completions.create(
        prompt=PROMPT, extra_body={"stop_token_ids": [tokens[4]]}, logprobs=0, **GREEDY
    )
    assert answer.choices[0].finish_reason == "stop"
    assert len(answer.choices[0].logprobs.tokens) == tokens.index(tokens[4]) + 1


def test_log_probabilities_are_those_of_transformers(server, model, ids):
    oracle = hf_mixtral(SPEAKING, std=0.2)
    answer = server.openai.completions.create(prompt=PROMPT, logprobs=2, echo=True, **GREEDY).choices[0]
    written = model.complete([PROMPT], max_gen_len=N)[0]
    whole = ids + written.token_ids
    logp_TV = log_softmax_of(oracle, whole)
    own = logp_TV[:-1].gather(1, torch.tensor(whole)[1:, None]).squeeze(1).tolist()
    logprobs = answer.logprobs
    assert answer.text == PROMPT + written.text
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == pytest.approx(own, abs=1e-4)
    for place, top in enumerate(logprobs.top_logprobs[1:]):
        best = logp_TV[place].topk(2).values.tolist()
        assert len(top) in (2, 3)
        assert sorted(top.values(), reverse=True)[:2] == pytest.approx(best, abs=1e-4)
        assert top[logprobs.tokens[place + 1]] == pytest.approx(own[place], abs=1e-4)
    for token, offset in list(zip(logprobs.tokens, logprobs.text_offset, strict=True))[2:]:
        assert answer.text[offset:].startswith(token)
    alone = server.openai.completions.create(prompt=PROMPT, logprobs=2, **GREEDY).choices[0].logprobs
    assert alone.tokens == logprobs.tokens[len(ids) :]
    assert alone.text_offset == logprobs.text_offset[len(ids) :]
    streamed = [
        chunk.choices[0].logprobs
        for chunk in server.openai.completions.create(prompt=PROMPT, logprobs=2, stream=True, **GREEDY)
    ]
    assert [token for piece in streamed for token in piece.tokens] == alone.tokens
    assert [offset for piece in streamed for offset in piece.text_offset] == alone.text_offset
    assert [p for piece in streamed for p in piece.token_logprobs] == pytest.approx(alone.token_logprobs, abs=1e-4)


def test_a_prompt_is_scored_without_an_answer(server, ids):
    """As lm-eval asks."""
    answer = server.openai.completions.create(
        model=NAME, prompt=[ids, ids[:4]], max_tokens=0, echo=True, logprobs=1, temperature=0
    )
    assert answer.usage.completion_tokens == 0
    first, second = (choice.logprobs for choice in answer.choices)
    assert (len(first.tokens), len(second.tokens)) == (len(ids), 4)
    assert first.token_logprobs[:4] == pytest.approx(second.token_logprobs, abs=1e-4)
    plain = server.openai.completions.create(model=NAME, prompt=ids, max_tokens=0, echo=True)
    assert (plain.choices[0].text, plain.choices[0].logprobs) == (PROMPT, None)
    none = server.openai.completions.create(model=NAME, prompt=ids, max_tokens=1, echo=True, logprobs=0)
    assert none.choices[0].logprobs.top_logprobs is None


def test_usage_tells_of_cached_tokens(server):
    long = [1, *range(300, 440)]
    first, second = (server.openai.completions.create(prompt=long, **GREEDY).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == 128


def test_an_adapter_is_a_model(server, model, greedy):
    expected = model.generate([PROMPT], max_gen_len=N, adapter="pirate")[0]
    assert text(server, model="pirate") == expected != greedy
    names = [entry.id for entry in server.openai.models.list()]
    assert names == [NAME, "pirate"]
    assert server.openai.models.retrieve("pirate").model_dump()["parent"] == NAME
    with pytest.raises(openai.NotFoundError, match="pirate"):
        server.openai.models.retrieve("nobody/else")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"suffix": "b"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True, "stream": True}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_it_does_not_do_is_refused(server, given, param):
    check_error(server.post("/v1/completions", prompt=PROMPT, **given), 400, param)


def test_null_stands_for_a_field_left_out(server, greedy):
    nothing = dict.fromkeys(("n", "stream", "echo", "stop", "seed", "top_p", "logprobs", "ignore_eos", "top_k"))
    answer = server.post("/v1/completions", prompt=PROMPT, temperature=0, max_tokens=N, **nothing)
    assert answer.json()["choices"][0]["text"] == greedy
    check_error(server.post("/v1/completions", prompt=None), 400, "prompt")


def test_the_small_routes(server, model, ids):
    tokenized = server.raw.post("/tokenize", json={"prompt": PROMPT}).json()
    assert tokenized == {"count": len(ids), "max_model_len": model.max_seq_len, "tokens": ids}
    without = server.raw.post("/tokenize", json={"prompt": PROMPT, "add_special_tokens": False}).json()
    assert without["tokens"] == ids[1:]
    assert server.raw.post("/detokenize", json={"tokens": ids}).json() == {"prompt": PROMPT}
    assert server.raw.get("/health").json() == {"status": "ok"}
    assert server.raw.get("/version").json()["version"]
    check_error(server.raw.post("/tokenize", json={}), 400, "prompt")
    check_error(server.raw.post("/detokenize", json={"tokens": [10**30]}), 400, "tokens.0")


def test_metrics_count_what_is_asked(server, ids):
    counts = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count")
    more = ("time_per_output_token_seconds_count", "e2e_request_latency_seconds_count")
    before = [server.metric(name) for name in (*counts, *more)]
    ended = server.metric("request_success_total", finished_reason="length")
    for _ in range(3):
        text(server)
    server.settle()
    grown = [server.metric(name) - old for name, old in zip((*counts, *more), before, strict=True)]
    assert grown == [3 * len(ids), 3 * N, 3, 3 * (N - 1), 3]
    assert server.metric("request_success_total", finished_reason="length") == ended + 3
    assert (server.metric("num_requests_running"), server.metric("num_requests_waiting")) == (0, 0)
    refused = server.metric("request_errors_total", status="400")
    server.post("/v1/completions", prompt="")
    assert server.metric("request_errors_total", status="400") == refused + 1
