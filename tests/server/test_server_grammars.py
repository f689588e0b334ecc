"""Answers that must match JSON, a schema, a regular expression, a grammar, or one of some texts."""

from __future__ import annotations

import json
import random
import re
import time

import pytest
from helpers.schemas import random_schema
from helpers.serving import NAME, check_error
from jsonschema import Draft202012Validator

MESSAGES = [{"role": "user", "content": "Write something."}]
CALL = {"model": NAME, "messages": MESSAGES, "temperature": 1.0, "max_completion_tokens": 160}


def of_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def content(server, **given):
    choice = server.openai.chat.completions.create(**{**CALL, **given}).choices[0]
    assert choice.finish_reason == "stop", choice
    return choice.message.content


def check_schema(server, number):
    schema = random_schema(random.Random(number))
    text = content(server, response_format=of_schema(schema), seed=number)
    Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize("number", range(8))
def test_json_schema_answers_are_valid(server, number):
    check_schema(server, number)


@pytest.mark.long
def test_json_schema_answers_valid_in_500_of_500_random_bounded_schemas_at_temperature_1(server):
    for number in range(500):
        check_schema(server, number)


def test_json_objects_are_json(server):
    for seed in range(3):
        # A random network hardly ends an object by itself, so closing is made likely.
        bias = {server.model.tokenizer.encode(text, bos=False, prefix=False)[-1]: 12.0 for text in ("}", '"')}
        text = content(server, response_format={"type": "json_object"}, seed=seed, logit_bias=bias)
        assert isinstance(json.loads(text), dict)
    plain = server.openai.chat.completions.create(response_format={"type": "text"}, **{**CALL, "temperature": 0})
    assert plain.choices[0].message.content


def test_white_space_between_parts_has_a_bound(server):
    """A model that would rather write spaces than anything else still ends, and may break lines and indent."""
    tokenizer = server.model.tokenizer
    pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    spaces = {token: 90.0 for token, piece in enumerate(pieces) if piece and not piece.strip()}
    answer = {"a": {"type": "boolean"}, "b": {"type": "null"}}
    schema = {"type": "object", "properties": answer, "required": ["a", "b"], "additionalProperties": False}
    text = content(server, response_format=of_schema(schema), seed=1, logit_bias=spaces)
    Draft202012Validator(schema).validate(json.loads(text))
    assert 2 < max(map(len, re.findall(r"\s+", text))) <= 26


@pytest.mark.parametrize("seed", range(3))
def test_structured_outputs_match(server, seed):
    def ask(**what):
        return content(server, seed=seed, extra_body={"structured_outputs": what})

    assert re.fullmatch(r"(\d{3}-){2}[äöü🦀]{2,4}", ask(regex=r"(\d{3}-){2}[äöü🦀]{2,4}"))
    words = ['yes "quoted"', "no\nline", "back\\slash", "größer 🦀"]
    assert ask(choice=words) in words
    assert re.fullmatch(r"(\d \+ )*\d", ask(grammar='start: N (" + " N){0,3}\nN: /[0-9]/'))
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 40}},
        "required": ["a"],
    }
    value = json.loads(ask(json={**schema, "additionalProperties": False}))
    assert 3 <= value["a"] <= 40


def test_copies_and_completions_match_too(server):
    answer = server.openai.completions.create(
        model=NAME, prompt="A", n=4, max_tokens=40, extra_body={"structured_outputs": {"regex": "[ab]{7}c"}}
    )
    texts = [choice.text for choice in answer.choices]
    assert all(re.fullmatch("[ab]{7}c", text) for text in texts)
    assert len(set(texts)) > 1


def test_a_stream_matches(server):
    stream = server.openai.chat.completions.create(
        stream=True, extra_body={"structured_outputs": {"regex": "[0-9]{9}"}}, **CALL
    )
    assert re.fullmatch("[0-9]{9}", "".join(c.delta.content or "" for chunk in stream for c in chunk.choices))


DEEP: dict = {"type": "string"}
for _ in range(400):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("what", "field"),
    [
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "structured_outputs.json"),
        ({"json": {"type": "object", "properties": {"a": False}, "required": ["a"]}}, "structured_outputs.json"),
        ({"json": {"type": "banana"}}, "structured_outputs.json"),
        ({"json": {"$ref": "http://127.0.0.1:1/schema"}}, "structured_outputs.json"),
        ({"json": {"$ref": "#"}}, "structured_outputs.json"),
        ({"json": DEEP}, "structured_outputs.json"),
        ({"regex": "("}, "structured_outputs.regex"),
        ({"regex": "(?=a)b"}, "structured_outputs.regex"),
        ({"regex": "[^\\s\\S]"}, "structured_outputs.regex"),
        ({"grammar": "start: foo"}, "structured_outputs.grammar"),
        ({"grammar": "start: start"}, "structured_outputs.grammar"),
        ({"grammar": "((("}, "structured_outputs.grammar"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"choice": ["a", ""]}, "structured_outputs.choice"),
        ({"choice": ["a"], "regex": "a"}, "structured_outputs.regex"),
        ({"choice": ["a", 1]}, "structured_outputs.choice.1"),
        ({"xml": "a"}, "structured_outputs.xml"),
    ],
)
def test_what_no_text_matches_is_refused(server, what, field):
    error = check_error(server.post("/v1/completions", prompt="A", structured_outputs=what), 400, field)
    assert error["message"].count("structured_outputs") <= 2


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": of_schema(None)}, "response_format"),
        ({"response_format": of_schema({"enum": []})}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
    ],
)
def test_what_contradicts_itself_is_refused(server, given, field):
    check_error(server.post("/v1/chat/completions", messages=MESSAGES, **given), 400, field)


@pytest.mark.parametrize(
    "what",
    [
        {"regex": "(a|b)*a(a|b){40}c"},
        {"regex": "(((.{0,1000}x){0,1000})y){0,1000}"},
        {"regex": "[a-z]{1000000}"},
        {"regex": "|".join("ab*" + ".?" * n + "c" for n in range(300))},
        {"regex": "(x+x+)+y"},
        {"regex": ".*(" + "|".join(chr(97 + n % 26) * 3 + f"{n}.*" for n in range(500)) + "){5}"},
        {"grammar": "start: a a a a a a a a\na: " + " | ".join(f'"{n}" a?' for n in range(2000))},
        {"grammar": "start: e\ne: e e | e e e | " + '"a" | "b"'},
        {"json": {"type": "array", "minItems": 10**6, "items": {"type": "string", "pattern": "(a|b)*a(a|b){30}"}}},
        {"json": {"anyOf": [{"type": "object", "properties": {f"p{n}": {"type": "string"}}} for n in range(1500)]}},
        {"json": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(3000)}}},
        {"json": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$", "minLength": 5000}},
        {"choice": [f"choice {n}" for n in range(20_000)]},
    ],
    ids=lambda what: f"{next(iter(what))} {str(what)[10:40]}",
)
def test_huge_grammars_take_bounded_time(server, what):
    """They are answered, or refused, and nobody else waits long meanwhile."""
    begun = time.monotonic()
    answer = server.post("/v1/completions", prompt="A", max_tokens=20, structured_outputs=what)
    took = time.monotonic() - begun
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        check_error(answer, 400, f"structured_outputs.{next(iter(what))}")
    assert took < 15
    server.settle()
