"""Programs that others wrote for OpenAI's API, asked of the server: `make test-serve` installs and runs them.

Without its package, a test is skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from helpers.serving import NAME

HOW = "make test-serve installs it"
TEXTS = [
    ("The best programming language", " in the world is"),
    ("A mixture of", " experts"),
    ("Größe und", " Gewicht 🦀"),
    ("", "Once upon a time"),
]


def every_route(server, cases, seconds=None):
    """Random requests by the description of the routes: no answer says that the server failed."""
    schemathesis = pytest.importorskip("schemathesis", reason=f"schemathesis is missing: {HOW}")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/completions", "/v1/chat/completions", "/tokenize"}
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    counted = 0
    for operation in operations:
        for mode in modes:
            strategy = operation.as_strategy(generation_mode=mode)

            @settings(
                max_examples=max(1, cases // (len(operations) * len(modes))),
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=strategy)
            def ask(case):
                nonlocal counted
                if isinstance(case.body, dict):
                    if isinstance(case.body.get("model"), str):
                        case.body["model"] = NAME
                    if isinstance(case.body.get("n"), int):
                        case.body["n"] = min(case.body["n"], 4)
                answer = case.call()
                counted += 1
                assert answer.status_code < 500, (case.body, answer.text)
                if answer.status_code >= 400 and case.method != "HEAD":
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

            try:
                ask()
            except Exception as error:
                if "Unsatisfiable" in type(error).__name__ or "Unsatisfiable" in str(error):
                    continue  # nothing about this route can be wrong
                raise
    server.settle(60)
    return counted


@pytest.mark.slow
def test_schemathesis_finds_no_failure(server):
    assert every_route(server, 400) > 100


@pytest.mark.long
def test_schemathesis_finds_no_failure_in_10_000_cases(server):
    assert every_route(server, 10_000) > 4000


@pytest.mark.slow
def test_lm_eval_scores_as_in_process(server, model, tmp_path):
    """`local-completions`: log-likelihoods, rolling ones, and what it has written."""
    pytest.importorskip("lm_eval", reason=f"lm-eval is missing: {HOW}")
    from helpers.small_tokenizers import mixtral_json_folder
    from lm_eval.api.instance import Instance

    folder = mixtral_json_folder(tmp_path / "tokenizer", add_bos_token=True, bos_token="<s>", eos_token="</s>")
    models = pytest.importorskip("lm_eval.models.openai_completions")
    lm = models.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model=NAME,
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        max_length=256,
        num_concurrent=1,
    )
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(TEXTS[:3])]
    got = lm.loglikelihood(asked)
    for (context, continuation), (score, greedy) in zip(TEXTS[:3], got, strict=True):
        context_ids, continuation_ids = lm._encode_pair(context, continuation)
        ours = model.evaluate_examples([context_ids + continuation_ids], contexts=[context_ids])
        assert score == pytest.approx(float(ours["log_likelihood"][0]), abs=1e-3)
        assert greedy == bool(ours["max_equal"][0])
    until = {"until": ["zzz"], "max_gen_toks": 12, "temperature": 0}
    (written,) = lm.generate_until([Instance("generate_until", {}, (TEXTS[0][0], until), 0)])
    assert [written] == model.generate([lm.tok_encode(TEXTS[0][0])], max_gen_len=12)


@pytest.mark.slow
def test_lm_eval_chats_as_in_process(server, model):
    pytest.importorskip("lm_eval", reason=f"lm-eval is missing: {HOW}")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion

    lm = LocalChatCompletion(
        base_url=f"{server.url}/v1/chat/completions", model=NAME, tokenizer_backend=None, tokenized_requests=False
    )
    context = lm.apply_chat_template([{"role": "user", "content": TEXTS[0][0]}])
    until = {"until": ["zzz"], "max_gen_toks": 12, "temperature": 0}
    (written,) = lm.generate_until([Instance("generate_until", {}, (context, until), 0)])
    template = server.service.template
    ids = template.prompt_ids([{"role": "user", "content": TEXTS[0][0]}], model.tokenizer)
    (text,) = model.generate([ids], max_gen_len=12, additional_stop_symbols=template.stop_strings)
    assert written == template.reply(text)


@pytest.mark.slow
def test_instructor_gets_objects(server):
    instructor = pytest.importorskip("instructor", reason=f"instructor is missing: {HOW}")
    from pydantic import BaseModel, ConfigDict, Field

    class Pet(BaseModel):
        model_config = ConfigDict(extra="forbid")  # a random network would add fields without end

        kind: Literal["cat", "dog"]
        age: int = Field(ge=0, le=30)
        names: list[Literal["Ada", "Bob"]] = Field(max_length=2)

    client = instructor.from_openai(server.openai, mode=instructor.Mode.JSON_SCHEMA)
    for seed in range(3):
        pet = client.chat.completions.create(
            model=NAME,
            response_model=Pet,
            messages=[{"role": "user", "content": "A pet."}],
            max_completion_tokens=200,
            seed=seed,
            max_retries=0,
        )
        assert isinstance(pet, Pet)
    parsed = server.openai.chat.completions.parse(
        model=NAME, response_format=Pet, messages=[{"role": "user", "content": "A pet."}], max_completion_tokens=200
    )
    assert isinstance(parsed.choices[0].message.parsed, Pet)


@pytest.mark.slow
def test_llm_comply_is_content(server):
    """But for tools and images, which this model does not have, and for ends, which a random network rarely writes."""
    pytest.importorskip("llm_comply", reason=f"llm-comply is missing: {HOW}")
    tests = "basic-response system-prompt multi-turn streaming-response streaming-usage error-handling".split()
    answer = ran(
        "llm-comply", "--base-url", f"{server.url}/v1", "--api-key", "none", "--model", NAME, "--format", "openai-chat",
        "--ignore", "finish_reason", "--filter", ",".join(f"chat-{test}" for test in tests), "--json",
    )  # fmt: skip
    summary = json.loads(answer.stdout)["summary"]
    assert (summary["passed"], summary["failed"]) == (len(tests), 0), answer.stdout


@pytest.mark.slow
def test_guidellm_measures(server, tmp_path):
    pytest.importorskip("guidellm", reason=f"guidellm is missing: {HOW}")
    from helpers.small_tokenizers import mixtral_json_folder

    folder = mixtral_json_folder(tmp_path / "tokenizer", bos_token="<s>", eos_token="</s>")
    answer = ran(
        "guidellm", "run", "--backend", f"kind=openai_http,target={server.url},model={NAME}",
        "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=12",
        "--tokenizer", f"kind=hf_auto,model={folder}",
        "--data", "kind=synthetic_text,prompt_tokens=30,output_tokens=12",
        "--output", f"kind=json,path={tmp_path / 'report.json'}", "--disable-progress",
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (12, 0)


def ran(program, *words):
    """A program that pip installed beside this Python."""
    command = [str(Path(sys.executable).parent / program), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
