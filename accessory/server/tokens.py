"""Log-probabilities of tokens in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accessory.data.tokenizer import Tokenizer
from accessory.model.writing import Completion

# JSON has no infinity. vLLM and llama.cpp send this number for tokens that cannot be drawn.
LEAST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, answer: Completion, tokens: range | None = None) -> dict[str, Any]:
    """/v1/chat/completions: a list of tokens (those numbered `tokens`, or all), each with its likeliest rivals."""
    assert answer.logprobs is not None
    content = []
    for n in tokens if tokens is not None else range(len(answer.token_ids)):
        top = answer.top_logprobs[n] if answer.top_logprobs else {}
        rivals = [_one(tokenizer, token, logprob) for token, logprob in top.items()]
        content.append({**_one(tokenizer, answer.token_ids[n], answer.logprobs[n]), "top_logprobs": rivals})
    return {"content": content, "refusal": None}


def _one(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": text_of(tokenizer, token),
        "logprob": max(logprob, LEAST),
        "bytes": list(tokenizer.token_bytes(token)),
    }


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; of a control token, which adds none to an answer, what its tokenizer calls it."""
    content = tokenizer.token_bytes(token)
    if content:
        return content.decode("utf-8", errors="replace")
    return next((text for text, number in tokenizer.special_tokens.items() if number == token), "")


def completion_logprobs(
    tokenizer: Tokenizer,
    echoed: Sequence[int],
    answer: Completion,
    before: Sequence[int],
    tokens: range | None = None,
) -> dict[str, Any]:
    """/v1/completions: lists, of the echoed prompt's tokens and of the answer's (those numbered `tokens`, or all).

    before: the prompt. The prompt's first token has no log-probability.
    """
    assert answer.logprobs is not None
    chosen = range(len(answer.token_ids)) if tokens is None else tokens
    ids = [*echoed, *(answer.token_ids[n] for n in chosen)]
    logprobs: list[float | None] = [answer.logprobs[n] for n in chosen]
    tops: list[Mapping[int, float] | None] = [answer.top_logprobs[n] if answer.top_logprobs else {} for n in chosen]
    if echoed:
        judged = answer.prompt_logprobs or []
        logprobs = [None, *judged, *logprobs]
        tops = [None, *(answer.prompt_top_logprobs or [{}] * len(judged)), *tops]
    named = [
        None
        if top is None or p is None
        else {text_of(tokenizer, t): max(q, LEAST) for t, q in [*top.items(), (token, p)]}
        for token, p, top in zip(ids, logprobs, tops, strict=True)
    ]  # the token itself is always one of them
    return {
        "tokens": [text_of(tokenizer, token) for token in ids],
        "token_logprobs": [None if p is None else max(p, LEAST) for p in logprobs],
        "top_logprobs": None if answer.top_logprobs is None else named,
        "text_offset": _offsets(tokenizer, [] if echoed else [*before, *answer.token_ids[: chosen.start]], ids),
    }


def _offsets(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Where the text of each token begins, in characters of the text of all. Control tokens have none."""
    begun, reader = tokenizer.reader()
    offsets, length = [], 0
    for token in (*before, *ids):
        offsets.append(length)
        piece = tokenizer.token_bytes(token, begun)
        begun = begun or bool(piece)
        length += len(reader.decode(piece))
    return offsets[len(before) :]
