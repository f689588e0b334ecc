import pytest
import torch
from helpers.random_models import canonical_from_hf, decoder_from_canonical, hf_mixtral
from helpers.sizes import TINY

from accessory.engine.generate import Generation
from accessory.engine.sampling import Sampling
from accessory.errors import InputError, NonFiniteError

ARGS = TINY.replace(vocab_size=97, max_seq_len=256)


@pytest.fixture(scope="module")
def oracle():
    return hf_mixtral(ARGS, std=0.2)


@pytest.fixture(params=["base", "sparse"])
def decoder(request, oracle):
    return decoder_from_canonical(ARGS, request.param, canonical_from_hf(oracle)).requires_grad_(False)


def collect(generation):
    rows = [[] for _ in generation.prompts]
    for step in generation:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def run(decoder, prompts, n=20, **options):
    return collect(Generation(decoder, prompts, max_gen_len=n, max_seq_len=256, **options))


PROMPTS = [[1, 5, 9], [1], [1, 80, 3, 44, 2, 61, 17, 30, 29, 28, 27]]


def test_greedy_tokens_are_those_of_transformers(decoder, oracle):
    for prompt in PROMPTS:
        theirs = oracle.generate(
            torch.tensor([prompt]), max_new_tokens=80, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert run(decoder, [prompt], n=80) == [theirs[0, len(prompt) :].tolist()]


def test_each_prompt_of_a_batch_gets_what_it_gets_alone(decoder):
    assert run(decoder, PROMPTS) == [run(decoder, [p])[0] for p in PROMPTS]


def test_in_bf16_a_batch_changes_a_prompts_tokens_only_at_near_ties():
    # Small weights: the router's margins are then as wide as a trained network's, and only rounding is left to differ.
    tensors = canonical_from_hf(hf_mixtral(ARGS, std=0.05))
    decoder = decoder_from_canonical(ARGS, "sparse", tensors).requires_grad_(False).cast(torch.bfloat16)
    prompts = [[1, *range(3, 3 + n)] for n in range(40)]
    differ = 0
    for prompt, together in zip(prompts, run(decoder, prompts), strict=True):
        alone = run(decoder, [prompt])[0]
        if together == alone:
            continue
        differ += 1
        same = next(n for n, pair in enumerate(zip(together, alone, strict=True)) if pair[0] != pair[1])
        logits_V = decoder(torch.tensor([prompt + alone[:same]])).logits[0, -1].float()
        gap = (logits_V[alone[same]] - logits_V[together[same]]).abs()
        assert gap <= 2 * 2**-8 * logits_V.abs().max(), (prompt, gap)  # two roundings to bf16's 8 bits
    assert differ < len(prompts) // 2


def test_rows_end_on_their_own(decoder):
    free = run(decoder, PROMPTS)
    stop = free[0][4]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert run(decoder, PROMPTS, stop_ids={stop}) == expected


def test_finish_ends_a_row_and_the_last_one_ends_the_run(decoder):
    generation = Generation(decoder, PROMPTS, max_gen_len=20, max_seq_len=256)
    rows = [[], [], []]
    for n, step in enumerate(generation):
        for row, token in zip(rows, step, strict=True):
            row += [] if token is None else [token]
        for row in range(3):
            if n == 2 * row:
                generation.finish(row)
    assert [len(r) for r in rows] == [1, 3, 5]


def test_sampling_repeats_under_a_seed_and_differs_without(decoder):
    draw = {seed: run(decoder, PROMPTS, sampling=Sampling(1.0, 0.9, seed)) for seed in (1, 2)}
    assert draw[1] == run(decoder, PROMPTS, sampling=Sampling(1.0, 0.9, 1))
    assert draw[1] != draw[2]


def test_a_stopped_row_does_not_disturb_the_others_draws(decoder):
    free = run(decoder, PROMPTS, sampling=Sampling(1.0, 0.9, 5))
    stopped = run(decoder, PROMPTS, sampling=Sampling(1.0, 0.9, 5), stop_ids={free[0][2]})
    for a, b in zip(free, stopped, strict=True):
        assert a[: len(b)] == b


def test_the_callers_grad_mode_is_left_alone(decoder):
    generation = iter(Generation(decoder, [[1]], max_gen_len=3, max_seq_len=256))
    next(generation)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("prompts", "options", "names"),
    [
        ([], {}, "prompts"),
        ([[]], {}, r"prompts\[0\]"),
        ([[1], [1] * 300], {}, r"prompts\[1\].*max_seq_len"),
        ([[1]], {"max_gen_len": 0}, "max_gen_len"),
        ([[1, 97]], {}, "vocab_size = 97"),
        ([[-1]], {}, "vocab_size = 97"),
    ],
)
def test_what_cannot_be_generated_is_one_error(decoder, prompts, options, names):
    with pytest.raises(InputError, match=names):
        Generation(decoder, prompts, **{"max_gen_len": 4, "max_seq_len": 256, **options})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("dtype", "likely"), [(torch.float32, "verify"), (torch.float16, "bf16")])
def test_logits_that_are_not_finite_are_an_error_with_the_likely_cause(decoder, temperature, dtype, likely):
    decoder.compute_in(dtype).cast(dtype)
    decoder.output.weight[5] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"^prompts\[0\]: the logits are not finite[^\n]*{likely}"):
        run(decoder, [[1, 5]], sampling=Sampling(temperature))


def test_a_row_that_has_ended_may_hold_what_it_likes(decoder):
    """Prompt 0 ends with its first token. Then its logits are NaN, and prompt 1 goes on as if it were alone."""
    expected = run(decoder, [[1, 5]], n=6)[0]
    generation = Generation(decoder, [[3], [1, 5]], max_gen_len=6, max_seq_len=256)

    def spoil(_, inputs, output):
        if not generation.running[0]:
            output[0] = float("nan")
        return output

    decoder.output.register_forward_hook(spoil)
    rows = [[], []]
    for step in generation:
        for row, token in zip(rows, step, strict=True):
            row.append(token)
        generation.finish(0)
    assert rows[0][1:] == [None] * 5
    assert rows[1] == expected
