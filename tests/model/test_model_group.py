"""The ranks of a process group share a model: every rank makes the same calls and gets the same result or error."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers.distributed import run_ranks
from helpers.threads import generate_in_threads

from accessory.errors import AccessoryError
from accessory.model.meta import MetaModel
from accessory.model.writing import TextRequest

PROMPT = "The best programming language in the world is"
HOW = {"dtype": torch.float32, "max_seq_len": 512, "device": "cpu"}


def outcome(call):
    """What a call returns, or its error as text."""
    try:
        return call()
    except (AccessoryError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def in_a_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(outcome(call)))
    thread.start()
    thread.join(30)
    return found[0] if found else "it hangs"


def calls(rank, world, folder):
    model = MetaModel.from_pretrained(folder, mp_group=dist.group.WORLD, **HOW)
    found = {}

    def refuse(longest):
        raise ValueError("the caller's own")

    # What the first rank was given counts.
    found["wrong on the first"] = outcome(lambda: model.generate([PROMPT], max_gen_len=4 if rank else 600))
    found["wrong on the second"] = model.generate([PROMPT], max_gen_len=600 if rank else 4)
    found["an error of a caller's function"] = outcome(lambda: model.generate([PROMPT], max_gen_len=4, on_step=refuse))
    left = model.stream_generate(PROMPT, max_gen_len=400)
    found["left"] = next(left)
    found["another thread"] = in_a_thread(lambda: model.generate([PROMPT], max_gen_len=4))
    left.close()
    found["another thread later"] = in_a_thread(lambda: model.generate([PROMPT], max_gen_len=4))
    half_read = model.stream_generate(PROMPT, max_gen_len=12)
    found["items"] = [next(half_read)]
    found["beside"] = model.generate(["A"], max_gen_len=4)
    found["items"] += half_read
    found["scores"] = model.evaluate_examples([PROMPT])["ppl"]
    wanted = [] if rank else [TextRequest(PROMPT, max_gen_len=4), TextRequest(""), TextRequest("A", max_gen_len=4)]
    found["answers"] = {n: (answer.text, str(answer.error)) for n, answer in model.answers(wanted)}
    found["sampled"] = model.generate([PROMPT], max_gen_len=8, temperature=1.0)
    return found


def test_every_rank_gets_what_the_first_one_gets(speaking):
    first, second = run_ranks(calls, 2, speaking)
    alone = MetaModel.from_pretrained(speaking, **HOW)
    assert first.pop("an error of a caller's function") == "ValueError: the caller's own"
    assert second.pop("an error of a caller's function") == "RankError: rank 0 failed: ValueError: the caller's own"
    assert first == second
    assert first["wrong on the first"].startswith("InputError: max_gen_len: got 600, but")
    four = alone.generate([PROMPT], max_gen_len=4)
    assert first["wrong on the second"] == first["another thread later"] == four
    assert first["another thread"] == (
        "InputError: mp_group: the ranks are in a call of another thread; make one call after the other"
    )
    assert first["items"][-1]["text"] == alone.generate([PROMPT], max_gen_len=12)[0]
    assert first["beside"] == alone.generate(["A"], max_gen_len=4)
    assert first["answers"] == {
        0: (four[0], "None"),
        1: ("", "prompt: is empty; give at least one character"),
        2: (first["beside"][0], "None"),
    }
    assert first["scores"] == pytest.approx(alone.evaluate_examples([PROMPT])["ppl"], rel=1e-4)


BAD = 31999  # a token whose logits are not finite


def with_bad_token(rank, world, folder):
    model = MetaModel.from_pretrained(folder, mp_group=dist.group.WORLD, **HOW)
    with torch.no_grad():
        model.llma.tok_embeddings.weight[BAD] = torch.nan
    if rank:
        model.follow()
        return None
    with model.lead():
        stream = model.stream_generate(PROMPT, max_gen_len=40)
        next(stream)
        bad = [
            outcome(partial(model.generate, [[1, BAD, 7]], max_gen_len=4, temperature=t, seed=1)) for t in (0.0, 1.0)
        ]
        return bad, list(stream)[-1]["text"], model.generate(["A"], max_gen_len=4), model.engine().scheduler.pool.free


def test_logits_that_are_not_finite_end_their_request_only(speaking):
    (bad, good, after, free), _ = run_ranks(with_bad_token, 2, speaking)
    assert all(said.startswith("NonFiniteError: the logits are not finite") for said in bad)
    alone = MetaModel.from_pretrained(speaking, **HOW)
    with torch.no_grad():
        alone.llma.tok_embeddings.weight[BAD] = torch.nan
    assert good == alone.generate([PROMPT], max_gen_len=40)[0]
    assert after == alone.generate(["A"], max_gen_len=4)
    assert free == alone.engine().scheduler.pool.pages - 1


def led(rank, world, folder):
    model = MetaModel.from_pretrained(folder, mp_group=dist.group.WORLD, **HOW)
    if rank:
        model.follow()
        return None
    found = {}
    with model.lead():
        found |= generate_in_threads(model, PROMPT, (3, 5, 7))
        found["wrong"] = outcome(lambda: model.generate([PROMPT], max_gen_len=0))
        next(stream := model.stream_generate(PROMPT, max_gen_len=400))
        found["score"] = model.evaluate_examples([PROMPT])["ppl"]
    found["half read when the lead ends"] = outcome(lambda: list(stream))
    return found


def test_any_thread_of_a_leading_rank_calls(speaking):
    found, _ = run_ranks(led, 2, speaking)
    alone = MetaModel.from_pretrained(speaking, **HOW)
    assert {n: found[n] for n in (3, 5, 7)} == {n: alone.generate([PROMPT], max_gen_len=n) for n in (3, 5, 7)}
    assert found["wrong"].startswith("InputError: max_gen_len: got 0")
    assert found["half read when the lead ends"] == "RankError: the ranks were closed while generating"
