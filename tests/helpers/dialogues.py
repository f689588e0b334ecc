"""Dialogues for tests, the spans a model learns from them, and the ids mistral-common gives them."""

import pytest

# The ids of the user messages "hi" and "more" in Mixtral-Instruct's format.
HI = [733, 16289, 28793, 12014, 733, 28748, 16289, 28793]
MORE = [733, 16289, 28793, 680, 733, 28748, 16289, 28793]


_MISTRAL: dict = {}  # version -> tokenizer; loading takes a while


def dialogue(*turns, system=None):
    """Messages of user and assistant in turn."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]


def learnt(ids, mask, tokenizer):
    """The spans a model learns, as text with EOS shown."""
    spans, previous = [], False
    for token, on in zip(ids, mask, strict=True):
        if on and not previous:
            spans.append([])
        if on:
            spans[-1].append(token)
        previous = on
    shown = {number: text for text, number in tokenizer.special_tokens.items()}
    return [
        "".join(shown.get(t) or tokenizer.token_bytes(t).decode("utf-8", "replace") for t in span) for span in spans
    ]


def mistral_common_ids(version, messages):
    pytest.importorskip("mistral_common", reason="mistral-common computes the golden vectors")
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    request = ChatCompletionRequest(messages=[kinds[m["role"]](content=m["content"]) for m in messages])
    if version not in _MISTRAL:
        _MISTRAL[version] = getattr(MistralTokenizer, version)()
    return _MISTRAL[version].encode_chat_completion(request).tokens
