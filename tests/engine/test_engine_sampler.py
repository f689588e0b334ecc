"""The sampler against transformers' processors, numbers worked out by hand, and itself in other batches."""

import math

import numpy as np
import pytest
import torch
from helpers.examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from accessory.engine import philox
from accessory.engine.draw import best, draw
from accessory.engine.sampler import Sampler
from accessory.engine.sampling_params import SamplingParams
from accessory.errors import InputError

PROMPT, ANSWER = [3, 5, 5, 8], [1, 5, 8, 8, 8]


def sampler_with(params, vocab_size, n=1, **started):
    sampler = Sampler(n, vocab_size, "cpu")
    for slot in range(n):
        sampler.start(slot, params, **{"prompt_ids": PROMPT, **started})
    return sampler


def drawn(logits, n=None, vocab_size=None, positions=None, masks=None, started=None, **params):
    """The tokens that `n` sequences with the same parameters and logits draw, each at its own position."""
    rows = logits.expand(n, -1) if logits.dim() == 1 else logits
    sampler = sampler_with(
        SamplingParams(**{"seed": 1, **params}), vocab_size or rows.shape[1], len(rows), **started or {}
    )
    return sampler(rows, range(len(rows)), positions or range(len(rows)), masks).token_B


def processed(logits_V, params):
    """The logits after transformers' processors, in the order in which its `generate` applies them."""
    processors = [
        (params.logit_bias, lambda: hf.SequenceBiasLogitsProcessor([[[i], b] for i, b in params.logit_bias.items()])),
        (params.repetition_penalty != 1, lambda: hf.RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))),
        (params.temperature != 1, lambda: hf.TemperatureLogitsWarper(float(params.temperature))),
        (params.top_k > 0, lambda: hf.TopKLogitsWarper(params.top_k)),
        (params.top_p < 1, lambda: hf.TopPLogitsWarper(float(params.top_p))),
        (params.min_p > 0, lambda: hf.MinPLogitsWarper(float(params.min_p))),
    ]
    said, scores = torch.tensor([PROMPT + ANSWER]), logits_V[None].clone()
    for wanted, make in processors:
        if wanted:
            scores = make()(said, scores)
    return scores[0]


def inverse_cdf(scores_V, uniform_N, ranked):
    """The ids where the cumulative probability exceeds each number, and how near each is to a boundary."""
    order = scores_V.sort(descending=True, stable=True).indices.numpy() if ranked else np.arange(len(scores_V))
    cumulative = scores_V.double().softmax(0).numpy()[order].cumsum()
    at = np.searchsorted(cumulative, uniform_N * cumulative[-1], side="right")
    return order[at], np.abs(cumulative[:, None] - uniform_N).min(0)


OPTIONS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1500},
    {"top_p": 0.2},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 20, "min_p": 0.2},
    {"top_p": 0.8, "min_p": 0.03},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.6, "top_k": 1200, "top_p": 0.95, "min_p": 0.01},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5, "top_k": 5},
    {"logit_bias": {3: 4.0, 5: -100.0, 60: 100.0}},
    {"logit_bias": {3: 4.0, 8: -3.5}, "repetition_penalty": 3.0, "temperature": 0.7, "top_p": 0.9},
]


def check_draws(token_N, logits_V, options, uniform_N):
    """Compare with the inverse of transformers' cumulative distribution."""
    params = SamplingParams(**{"top_p": 1.0, "seed": 5, "temperature": 1.0, **options})
    ranked = 0 < params.top_k < len(logits_V) or params.top_p < 1
    expected, margin = inverse_cdf(processed(logits_V, params), uniform_N, ranked)
    certain = margin > 1e-5  # by more than what rounds differently in fp32
    assert certain.mean() > 0.9
    np.testing.assert_array_equal(token_N[certain], expected[certain])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab_size", [100, 2000])
def test_draws_are_those_of_transformers_distribution(options, vocab_size):
    n = 400
    logits = torch.randn(vocab_size) * 3
    options = {"temperature": 1.0, "top_p": 1.0, "seed": 5, **options}
    token = drawn(logits, n=n, started={"answer_ids": ANSWER}, **options).numpy()
    check_draws(token, logits, options, philox.uniform([5] * n, [0] * n, range(n)))


@pytest.mark.parametrize("vocab_size", [100, 2000])
def test_draws_of_all_kinds_in_one_batch_are_each_their_own(vocab_size):
    n = 50
    logits = torch.randn(len(OPTIONS), vocab_size) * 3
    sampler = Sampler(n * len(OPTIONS), vocab_size, "cpu")
    for slot in range(n * len(OPTIONS)):
        params = {"temperature": 1.0, "top_p": 1.0, "seed": 5, **OPTIONS[slot % len(OPTIONS)]}
        sampler.start(slot, SamplingParams(**params), PROMPT, ANSWER)
    positions = np.arange(n).repeat(len(OPTIONS))
    token = sampler(logits.repeat(n, 1), range(len(positions)), positions).token_B.numpy()
    for i, options in enumerate(OPTIONS):
        check_draws(token[i :: len(OPTIONS)], logits[i], options, philox.uniform([5] * n, [0] * n, range(n)))


@pytest.mark.parametrize("k", [0, 4, 1500])
def test_the_ends_of_the_uniform_numbers_draw_only_what_has_a_probability(k):
    x = torch.full((3, 1500), -torch.inf)
    x[:, 1:3] = 0.0
    numbers = [[u, 1.0, k or 1500, 1.0, 0.0] for u in (0.0, 0.5, 1 - 2**-53)]
    assert draw(x, torch.tensor(numbers, dtype=torch.float64), k).tolist() == [1, 2, 2]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_presence_and_frequency_by_hand(temperature):
    # The answer has 1 once, 5 once and 8 three times. 3 is in the prompt alone, which does not count.
    logits = torch.full((10,), -100.0)
    logits[[1, 3, 5, 8]] = torch.tensor([2.0, 1.0, 2.0, 4.0])
    after = torch.full((10,), -100.0)
    after[[1, 3, 5, 8]] = torch.tensor([2 - 0.5 - 0.75, 1, 2 - 0.5 - 0.75, 4 - 0.5 - 3 * 0.75])
    options = {"presence_penalty": 0.5, "frequency_penalty": 0.75, "temperature": temperature, "top_p": 1.0}
    token = drawn(logits, n=500, started={"answer_ids": ANSWER}, **options).numpy()
    expected = inverse_cdf(after, philox.uniform([1] * 500, [0] * 500, range(500)), ranked=False)[0]
    np.testing.assert_array_equal(token, [8] * 500 if temperature == 0 else expected)


def test_a_drawn_token_counts_from_the_next_draw_on():
    sampler = sampler_with(SamplingParams(frequency_penalty=1.0), 4, prompt_ids=[0])
    logits = torch.tensor([[0.0, 3.5, 3.0, 1.0]])
    tokens = [sampler(logits, [0], [step]).token_B.item() for step in range(5)]
    # 1 falls from 3.5 by 1 each time; 2 from 3.
    assert tokens == [1, 2, 1, 2, 1]
    again = sampler_with(SamplingParams(frequency_penalty=1.0), 4, prompt_ids=[0], answer_ids=tokens[:3])
    assert again(logits, [0], [3]).token_B.item() == tokens[3]


def test_a_slot_forgets_its_last_sequence():
    params = SamplingParams(repetition_penalty=50.0)
    sampler = sampler_with(params, 4, prompt_ids=[1], answer_ids=[2])
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    assert sampler(logits, [0], [1]).token_B.item() == 0
    sampler.start(0, params, [0])
    assert sampler(logits, [0], [0]).token_B.item() == 1
    sampler.start(0, SamplingParams(), [0])
    assert sampler(logits, [0], [0]).token_B.item() == 1


def test_ids_beyond_the_tokenizer_are_never_drawn_and_placeholders_never_counted():
    logits = torch.tensor([0.0, 1.0, 9.0, float("nan")])
    assert drawn(logits, n=3, vocab_size=2, repetition_penalty=1.1).tolist() == [1, 1, 1]
    assert set(drawn(logits, n=50, vocab_size=2, temperature=1.0, started={"prompt_ids": [-1, 3]}).tolist()) == {0, 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"presence_penalty": 1.0}, {"temperature": 1.0, "top_k": 1}], ids=str)
def test_of_equal_logits_the_lowest_id_wins(dtype, options):
    logits = torch.randn(40, 3000).clamp(max=1.5).to(dtype)
    logits[0] = 0.0
    logits[0, :100] = -0.0
    first = [row.index(max(row)) for row in logits.tolist()]
    assert drawn(logits, started={"prompt_ids": []}, **options).tolist() == first


def test_the_best_of_equal_numbers_are_those_of_a_stable_sort():
    x = torch.randint(-4, 4, (20, 500)).float() * torch.tensor([1.0, 0.0]).repeat(250)
    x[:, 7], x[:, 9], x[:, 11], x[:, 13] = float("inf"), float("-inf"), -1e-45, 3e38
    for k in (1, 5, 200, 500):
        values, ids = best(x, k)
        expected = (x + 0.0).sort(dim=-1, descending=True, stable=True)
        assert torch.equal(values, expected.values[:, :k])
        assert torch.equal(ids, expected.indices[:, :k])


@pytest.mark.parametrize("options", [{"top_k": 40}, {"top_p": 0.2}, {"top_k": 1500, "top_p": 0.2}], ids=str)
def test_where_equal_logits_are_cut_the_lowest_ids_stay(options):
    # 200 equal logits: 40 of them are a fifth of the mass.
    logits = torch.full((2000,), -1000.0)
    logits[100:300] = 2.0
    tokens = drawn(logits, n=1000, temperature=1.0, **{"top_p": 1.0, **options})
    assert set(tokens.tolist()) == set(range(100, 140))


BAD = {"nan": float("nan"), "inf": float("inf")}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 1.0},
        {"top_k": 2, "temperature": 0.5},
        {"logit_bias": {2: 5.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("bad", BAD)
def test_a_row_that_is_not_finite_draws_minus_one_and_others_draw_on(options, bad):
    logits = torch.randn(4, 30)
    alone = drawn(logits, **options)
    logits[1, 29], logits[2] = BAD[bad], -torch.inf
    tokens = drawn(logits, **options)
    assert tokens[1:3].tolist() == [-1, -1]
    assert tokens[[0, 3]].tolist() == alone[[0, 3]].tolist()


def test_a_masked_nan_is_still_an_error_and_so_is_a_mask_of_nothing():
    logits = torch.zeros(3, 8)
    logits[0, 7] = float("nan")
    masks = {0: torch.arange(8) < 4, 1: torch.zeros(8, dtype=torch.bool)}
    assert drawn(logits, masks=masks).tolist() == [-1, -1, 0]


@pytest.mark.parametrize("temperature", [0, 2.0])
@pytest.mark.parametrize("form", ["bool", "array", "bytes"])
def test_a_mask_lets_only_its_tokens_be_drawn(temperature, form):
    allowed = torch.zeros(19, dtype=torch.bool)
    allowed[[0, 9, 18]] = True
    packed = np.packbits(allowed.numpy())
    mask = {"bool": allowed, "array": packed, "bytes": packed.tobytes()}[form]
    logits = torch.randn(60, 19)
    masks = dict.fromkeys(range(0, 60, 2), mask)
    masked = logits.clone()
    masked[::2, ~allowed] = -torch.inf
    options = {"temperature": temperature, "top_p": 1.0}
    tokens = drawn(logits, masks=masks, **options)
    assert torch.equal(tokens, drawn(masked, **options))
    assert set(tokens[::2].tolist()) == {0, 9, 18}


def test_min_tokens_holds_off_what_stops():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    for options in ({}, {"logit_bias": {3: 100.0}}):
        tokens = drawn(logits, n=5, min_tokens=3, started={"stop_ids": [3, 2, 77]}, **options)
        assert tokens.tolist() == [1, 1, 1, 3, 3]
    assert drawn(logits, n=2, min_tokens=3).tolist() == [3, 3]  # nothing stops


def test_start_refuses_a_bias_for_a_token_that_is_not_there():
    with pytest.raises(InputError, match="logit_bias"):
        sampler_with(SamplingParams(logit_bias={9: 1.0}), 9)


@pytest.mark.parametrize("options", [{"top_p": 1.0}, {"top_p": 0.9}, {"top_p": 1.0, "top_k": 6}], ids=str)
def test_20000_draws_follow_the_probabilities(options):
    n = 20000
    params = SamplingParams(temperature=0.8, seed=2**40 + 3, **options)
    sampler = sampler_with(params, 12)
    logits = torch.randn(12)
    count = np.bincount(sampler(logits.expand(n, -1), [0] * n, range(n)).token_B, minlength=12)
    expected = processed(logits, params).double().softmax(0).numpy() * n
    kept = expected > 0
    assert count[~kept].sum() == 0
    chi_square = ((count - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 3 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e300])
def test_extreme_temperatures_are_limits(temperature):
    tokens = drawn(torch.tensor([1.0, 5.0, 4.999, -7.0]), n=100, temperature=temperature, top_p=1.0)
    assert set(tokens.tolist()) == ({1} if temperature < 1 else {0, 1, 2, 3})


def test_seed_copy_and_position_each_change_the_draws():
    logits = torch.zeros(1000)
    base = drawn(logits, n=20, temperature=1.0)
    assert torch.equal(base, drawn(logits, n=20, temperature=1.0))
    for other in ({"seed": 2}, {"seed": 1 + 2**32}, {"copy": 1}, {"positions": range(20, 40)}):
        assert (base != drawn(logits, n=20, temperature=1.0, **other)).sum() > 15


KINDS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 1.0, "top_k": 50, "logprobs": 0},
    {"temperature": 1.0, "top_k": 1100, "min_p": 0.01},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "top_p": 1.0},
    {"temperature": 0.0, "presence_penalty": 1.0, "logit_bias": {4: 2.0}},
    {"temperature": 2.0, "min_tokens": 9, "top_k": 3, "logprobs": 7},
]


@settings(max_examples=examples(40))
@given(
    st.lists(st.tuples(st.sampled_from(range(len(KINDS))), st.integers(0, 99), st.booleans()), min_size=1, max_size=9),
    st.randoms(use_true_random=False),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_draws_the_same_in_any_batch(sequences, random, dtype):
    """Three steps in one batch; then each row alone, and all in another order, in other slots."""
    vocab_size = 1201
    generator = torch.Generator().manual_seed(len(sequences))
    logits_3BV = (torch.randn(3, len(sequences), vocab_size + 4, generator=generator) * 2).to(dtype)
    allowed_BV = torch.rand(len(sequences), vocab_size, generator=generator) < 0.5

    def run(rows, slots):
        sampler = Sampler(16, vocab_size, "cpu")
        for row, slot in zip(rows, slots, strict=True):
            kind, seed, _ = sequences[row]
            sampler.start(slot, SamplingParams(seed=seed, **KINDS[kind]), PROMPT, ANSWER, stop_ids=[2])
        masks = {i: allowed_BV[row] for i, row in enumerate(rows) if sequences[row][2]}
        steps = [sampler(logits_3BV[step, rows], slots, [5 + step] * len(rows), masks) for step in range(3)]
        return {
            row: [told(step, i, KINDS[sequences[row][0]].get("logprobs")) for step in steps]
            for i, row in enumerate(rows)
        }

    def told(step, i, n):
        if n is None:
            return step.token_B[i].item()
        return [
            step.token_B[i].item(),
            step.logprob_B[i].item(),
            *([step.top_ids_BK[i, :n].tolist(), step.top_logprobs_BK[i, :n].tolist()] if n else []),
        ]

    rows = list(range(len(sequences)))
    together = run(rows, rows)
    for row in rows:
        assert run([row], [15])[row] == together[row]
    random.shuffle(rows)
    assert run(rows, random.sample(range(16), len(rows))) == together


def test_log_probabilities_are_those_of_the_raw_logits():
    logits = torch.randn(3, 50) * 4
    options = {"temperature": 3.0, "repetition_penalty": 2.0, "logit_bias": {7: 3.0}, "top_k": 5, "seed": 1}
    sampler = Sampler(3, 40, "cpu")
    for slot, n in enumerate([0, 4, None]):
        sampler.start(slot, SamplingParams(**options, logprobs=n), PROMPT)
    got = sampler(logits, [0, 1, 2], [0, 0, 0])
    want = logits[:, :40].log_softmax(-1)
    assert torch.equal(got.logprob_B, want.gather(1, got.token_B[:, None])[:, 0])
    assert got.top_ids_BK.shape == (3, 4)
    assert torch.equal(got.top_logprobs_BK, want.topk(4).values)
    assert torch.equal(got.top_ids_BK, want.topk(4).indices)
    none = drawn(logits, vocab_size=40), sampler(logits[:1], [2], [1])
    assert none[1].logprob_B is None
    assert none[1].top_ids_BK is None


def test_log_probabilities_of_a_prompt():
    logits, ids = torch.randn(600, 50), torch.randint(0, 40, (600,))
    want = logits[:, :40].log_softmax(-1)
    for n in (0, 3, 99):
        chosen, top_ids, top = Sampler(1, 40, "cpu").prompt_logprobs(logits, ids, n)
        torch.testing.assert_close(chosen, want[torch.arange(600), ids])
        if n == 0:
            assert (top_ids, top) == (None, None)
        else:
            torch.testing.assert_close(top, want.sort(descending=True).values[:, :n])
            assert torch.equal(want.gather(1, top_ids), top)


def test_greedy_without_options_looks_at_the_logits_once(monkeypatch):
    sampler = sampler_with(SamplingParams(), 50, 4)
    for name in ("_logprobs", "_send", "_penalise"):
        monkeypatch.setattr(sampler, name, lambda *_: pytest.fail("greedy needs none of it"))
    logits = torch.randn(4, 50)
    assert torch.equal(sampler(logits, range(4), [0] * 4).token_B, logits.argmax(-1))
    assert sampler._answer_SV is None
