"""Scores of given texts, against transformers on the same weights and ids."""

import math

import pytest
import torch

from accessory.errors import InputError, NonFiniteError

PROMPT = "The best programming language in the world is"


def test_scores_are_those_of_transformers(model, oracle):
    example, context = "The capital of France is Paris", "The capital of France"
    ids = model.tokenizer.encode(example, bos=True)
    start = len(model.tokenizer.encode(context, bos=True))
    with torch.no_grad():
        logits = oracle(torch.tensor([ids])).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]))
    result = model.evaluate_examples([example, example], contexts=[context, ""])
    assert result["log_likelihood"][0] == pytest.approx(-loss.item() * (len(ids) - start), rel=1e-4)
    assert result["ppl"][0] == pytest.approx(math.exp(loss.item()), rel=1e-4)
    assert result["max_equal"] == [False, False]
    assert result["non_context_logits"][0].shape == (len(ids) - start, 32000)
    whole = model.evaluate_examples([example])
    assert whole["log_likelihood"][0] == pytest.approx(result["log_likelihood"][1], rel=1e-5)


def test_greedy_continuation_is_max_equal(model):
    ids = model.tokenizer.encode(PROMPT, bos=True)
    greedy = [int(model.compute_logits([ids])[0][-1].argmax())]
    assert model.evaluate_examples([[*ids, *greedy]], contexts=[ids])["max_equal"] == [True]


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda m: m.compute_logits(["x " * 600]), r"examples\[0\].*max_seq_len"),
        (lambda m: m.evaluate_examples(["abc"], contexts=["x"]), r"contexts\[0\]"),
        (lambda m: m.evaluate_examples(["abc"], contexts=["abc"]), r"examples\[0\]"),
        (lambda m: m.evaluate_examples(["abc"], contexts=[]), "contexts"),
    ],
)
def test_bad_input_is_one_error_naming_it(model, call, names):
    with pytest.raises(InputError, match=names) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_a_likelihood_that_is_no_number_is_an_error_and_logits_are_data(model, monkeypatch):
    monkeypatch.setattr(model.llma.output, "weight", torch.nn.Parameter(torch.full((32000, 32), float("nan"))))
    with pytest.raises(NonFiniteError, match=r"^examples\[0\]: the logits are not finite"):
        model.evaluate_examples([PROMPT])
    assert model.compute_logits([PROMPT])[0].isnan().all()
