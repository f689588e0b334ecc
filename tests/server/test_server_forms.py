"""/v1/messages and /v1/responses: the answers of /v1/chat/completions in Anthropic's form and in OpenAI's newer one.

The packages anthropic and openai read them; events are also compared with lists written by hand.
"""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from helpers.serving import NAME, check_error, serving

from accessory.model.writing import Completion
from accessory.server.messages import MessagesRequest
from accessory.server.responses import ResponsesRequest
from accessory.server.service import Job

N = 12
QUESTION = "Which language is best?"
USER = {"role": "user", "content": QUESTION}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"


@pytest.fixture(scope="module")
def greedy(server):
    """What /v1/chat/completions answers."""
    messages = [{"role": "system", "content": "Be brief."}, USER]
    return server.openai.chat.completions.create(model=NAME, messages=messages, temperature=0, max_completion_tokens=N)


@pytest.fixture(scope="module")
def claude(server):
    anthropic = pytest.importorskip("anthropic", reason="anthropic is missing: make test-serve installs it")
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


# --------------------------------------------------------------------------- their clients


def test_messages_are_what_a_chat_answers(server, greedy):
    body = {"messages": [USER], "system": "Be brief.", "temperature": 0, "max_tokens": N}
    answer = server.post(MESSAGES, **body).json()
    text = greedy.choices[0].message.content
    assert answer["content"] == [{"type": "text", "text": text}]
    assert (answer["stop_reason"], answer["role"], answer["model"]) == ("max_tokens", "assistant", NAME)
    used = answer["usage"]
    assert used["input_tokens"] + used["cache_read_input_tokens"] == greedy.usage.prompt_tokens
    assert used["output_tokens"] == N
    blocks = [{"type": "text", "text": QUESTION[:5]}, {"type": "text", "text": QUESTION[5:]}]
    body |= {"messages": [{"role": "user", "content": blocks}], "system": [{"type": "text", "text": "Be brief."}]}
    assert server.post(MESSAGES, **body).json()["content"] == answer["content"]
    stop = text[4:8]
    stopped = server.post(MESSAGES, **body, stop_sequences=["zzzz", stop]).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", stop)
    assert stopped["content"][0]["text"] == text[: text.index(stop)]


def test_anthropics_client_reads_them(claude, greedy):
    how = {"model": NAME, "max_tokens": N, "system": "Be brief.", "messages": [USER], "extra_body": {"temperature": 0}}
    text = greedy.choices[0].message.content
    answer = claude.messages.create(**how)
    assert (answer.content[0].text, answer.stop_reason) == (text, "max_tokens")
    with claude.messages.stream(**how) as stream:
        assert "".join(stream.text_stream) == text
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason, final.usage.output_tokens) == (text, "max_tokens", N)
    import anthropic

    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(**{**how, "max_tokens": 1000})
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**{**how, "model": "other"})


def test_openais_client_reads_responses(server, greedy):
    client = server.openai.responses
    how = {"model": NAME, "instructions": "Be brief.", "temperature": 0, "max_output_tokens": N}
    text = greedy.choices[0].message.content
    for given in (QUESTION, [USER], [{**USER, "content": [{"type": "input_text", "text": QUESTION}]}]):
        answer = client.create(input=given, **how)
        assert (answer.output_text, answer.status) == (text, "incomplete")
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (greedy.usage.prompt_tokens, N)
    with client.stream(input=QUESTION, **how) as stream:
        seen = list(stream)
    assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == text
    assert (seen[-1].type, seen[-1].response.output_text) == ("response.incomplete", text)
    # An answer goes back as a part of the next request.
    again = client.create(input=[USER, *(item.to_dict() for item in answer.output), USER], **how)
    assert again.usage.input_tokens > answer.usage.input_tokens
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}}
    assert json.loads(client.create(model=NAME, input=QUESTION, text=form).output_text) == {"a": 1}


@pytest.mark.parametrize(
    ("path", "given", "param"),
    [
        (MESSAGES, {"messages": [USER]}, "max_tokens"),
        (MESSAGES, {"messages": [], "max_tokens": 3}, "messages"),
        (MESSAGES, {"messages": [USER, USER], "max_tokens": 3}, "messages[1]"),
        (MESSAGES, {"messages": [USER], "max_tokens": 3, "temperature": 1.5}, "temperature"),
        (MESSAGES, {"messages": [USER], "max_tokens": 3, "thinking": {"type": "enabled"}}, "thinking"),
        (MESSAGES, {"messages": [USER], "max_tokens": 3, "stop_sequences": [""]}, "stop_sequences"),
        (MESSAGES, {"messages": [USER], "max_tokens": 3, "tool_choice": {"type": "tool"}}, "tool_choice"),
        (MESSAGES, {"messages": [USER], "max_tokens": 3, "tools": [{"name": "f", "input_schema": {}}]}, "tools"),
        (MESSAGES, {"messages": [{**USER, "content": [{"type": "sound"}]}], "max_tokens": 3}, "messages.0.content.0"),
        (MESSAGES, {"messages": [{**USER, "content": []}], "max_tokens": 10**6}, "max_tokens"),
        (RESPONSES, {}, "input"),
        (RESPONSES, {"input": []}, "input"),
        (RESPONSES, {"input": [USER, USER]}, "input[1]"),
        (RESPONSES, {"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        (RESPONSES, {"input": "a", "max_output_tokens": 100_000}, "max_output_tokens"),
        (RESPONSES, {"input": "a", "reasoning": {"effort": "low"}}, "reasoning"),
        (RESPONSES, {"input": "a", "truncation": "auto"}, "truncation"),
        (RESPONSES, {"input": "a", "tools": [{"type": "web_search"}]}, "tools.0.type"),
        (RESPONSES, {"input": "a", "text": {"format": {"type": "json_schema"}}}, "text"),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "a"}]}, "input.0"),
    ],
)
def test_what_they_do_not_do_is_refused(server, path, given, param):
    check_error(server.post(path, **given), 400, param)


def test_anthropics_header_is_a_key(model):
    with serving(model, api_key="a-key") as server, httpx.Client(base_url=server.url) as client:
        body = {"model": NAME, "messages": [USER], "max_tokens": 2}
        assert client.post(MESSAGES, json=body, headers={"x-api-key": "a-key"}).status_code == 200
        assert client.post(MESSAGES, json=body, headers={"x-api-key": "other"}).status_code == 401


def test_an_error_in_a_stream_is_an_event(server, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(server.thread.engine.executor, "submit", fails)
    for path, body in ((MESSAGES, {"messages": [USER], "max_tokens": 3}), (RESPONSES, {"input": "a"})):
        lines = server.post(path, **body, stream=True).text.split("\n\n")
        name, data = lines[-2].split("\n")
        said = json.loads(data.removeprefix("data: "))
        assert (name, said["type"]) == ("event: error", "error")
        assert "the server failed" in said["message"] == said["error"]["message"]


# --------------------------------------------------------------------------- by hand


def job(asked, read=7, written=2):
    completion = Completion(read, text="Hi", token_ids=[5] * written, cached_tokens=3)
    return Job("chatcmpl-ab", asked.chat(), [SimpleNamespace(completion=completion)], [[1]], created=5)


CALLED = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"city": "Ulm"}'}}


def chat_object(content, calls=(), reason="stop"):
    message = {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {})}
    return {"choices": [{"index": 0, "message": message, "finish_reason": reason}]}


def events(asked, *deltas, reason="stop"):
    async def pieces():
        for delta in ({"role": "assistant", "content": ""}, *deltas):
            yield {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}

    async def read():
        return [event async for event in asked.events(job(asked), pieces(), None)]

    return asyncio.run(read())


def messages(**given):
    return MessagesRequest.model_validate({"model": "m", "messages": [USER], "max_tokens": 9, **given})


def responses(**given):
    return ResponsesRequest.model_validate({"model": "m", "input": "Hello", **given})


USED = {"input_tokens": 4, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3, "output_tokens": 2}


def test_the_events_of_a_message():
    about = {"id": "msg_ab", "type": "message", "role": "assistant", "model": "m", "content": []}
    tool = {"type": "tool_use", "id": "abcdefghi", "name": "f", "input": {}}
    argument = {"type": "input_json_delta", "partial_json": '{"city": "Ulm"}'}
    found = events(messages(), {"content": "H"}, {"content": "i"}, {"tool_calls": [CALLED]}, reason="tool_calls")
    assert found == [
        {"type": "message_start", "message": {**about, "stop_reason": None, "stop_sequence": None, "usage": USED}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "H"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "i"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": tool},
        {"type": "content_block_delta", "index": 1, "delta": argument},
        {"type": "content_block_stop", "index": 1},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": USED},
        {"type": "message_stop"},
    ]
    asked = messages()
    whole = asked.whole(job(asked), chat_object("Hi", [CALLED], "tool_calls"), None)
    assert whole["content"] == [{"type": "text", "text": "Hi"}, {**tool, "input": {"city": "Ulm"}}]


def test_the_events_of_a_response():
    found = events(responses(), {"content": "H"}, {"content": "i"}, {"tool_calls": [CALLED]})
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "output_item.added",
        "function_call_arguments.delta", "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    part = {"type": "output_text", "text": "Hi", "annotations": [], "logprobs": []}
    said = {"id": "msg_ab", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    call = {"id": "fc_ab0", "type": "function_call", "status": "completed", "call_id": "abcdefghi", "name": "f",
            "arguments": '{"city": "Ulm"}'}  # fmt: skip
    assert (found[8]["item"], found[8]["output_index"]) == (said, 0)
    assert (found[12]["item"], found[12]["output_index"]) == (call, 1)
    last = found[-1]["response"]
    assert (last["status"], last["output"], last["created_at"]) == ("completed", [said, call], 5)
    assert last["usage"] == {
        "input_tokens": 7, "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0}, "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 9,
    }  # fmt: skip
    asked = responses()
    assert asked.whole(job(asked), chat_object("Hi", [CALLED]), None)["output"] == [said, call]
    cut = events(responses(), {"content": "Hi"}, reason="length")
    assert (cut[-1]["type"], cut[-1]["response"]["output"][0]["status"]) == ("response.incomplete", "incomplete")


def test_dialogues_with_tools_become_those_of_chat():
    """Both forms of one dialogue are the same request to /v1/chat/completions."""
    used = {"type": "tool_use", "id": "abcdefghi", "name": "f", "input": {"city": "Ulm"}}
    result = {"type": "tool_result", "tool_use_id": "abcdefghi", "content": [{"type": "text", "text": "21"}]}
    theirs = [USER, {"role": "assistant", "content": [used]}, {"role": "user", "content": [result]}]
    tools = [{"name": "f", "description": "Weather", "input_schema": PARAMETERS}]
    first = messages(messages=theirs, tools=tools, system="Be brief.", tool_choice={"type": "tool", "name": "f"})
    items = [
        USER,
        {"type": "function_call", "call_id": "abcdefghi", "name": "f", "arguments": '{"city": "Ulm"}'},
        {"type": "function_call_output", "call_id": "abcdefghi", "output": "21"},
    ]
    tools = [{"type": "function", "name": "f", "description": "Weather", "parameters": PARAMETERS}]
    choice = {"type": "function", "name": "f"}
    second = responses(input=items, tools=tools, instructions="Be brief.", tool_choice=choice, max_output_tokens=9)
    for chat in (first.chat(), second.chat()):
        assert [message.model_dump(exclude_none=True) for message in chat.messages] == [
            {"role": "system", "content": "Be brief."},
            USER,
            {"role": "assistant", "tool_calls": [CALLED]},
            {"role": "tool", "content": "21", "tool_call_id": "abcdefghi"},
        ]
        assert chat.tools[0].function.model_dump(exclude_none=True) == {
            "name": "f", "description": "Weather", "parameters": PARAMETERS,
        }  # fmt: skip
        assert chat.tool_choice.function.name == "f"
        assert (chat.max_completion_tokens or chat.max_tokens) == 9


def test_images_become_data_urls():
    source = {"type": "base64", "media_type": "image/png", "data": "AA=="}
    first = messages(messages=[{"role": "user", "content": [{"type": "image", "source": source}]}])
    item = {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AA=="}]}
    for chat in (first.chat(), responses(input=[item]).chat()):
        assert chat.messages[0].content[0].image_url.url == "data:image/png;base64,AA=="
