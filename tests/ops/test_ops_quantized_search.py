"""int4's scale search against plain rounding and an exhaustive search; GPTQ against rounding to the nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.errors import ConfigError
from accessory.ops.gptq import DAMPING_LEAST, DAMPING_MOST, damping_for, gptq, inverse_root
from accessory.ops.quantized import dequantize, quantize
from accessory.ops.quantized_search import MANY_ROUNDS, MANY_STARTS, search_int4


def group_errors(packed, weight, importance=1.0):
    return ((dequantize(packed) - weight).square() * importance).double().unflatten(-1, (-1, 128)).sum(-1)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-6, 0.02, 1.0, 1e4]),
    shift=st.floats(-3, 3),
    power=st.sampled_from([0.0, 1.0, 3.0]),  # 0: signs alone; 3: heavy tails
    weighted=st.booleans(),
)
def test_no_group_is_worse_than_plainly_rounded(seed, scale, shift, power, weighted):
    w = normal(3, 256, seed=seed)
    w = (w.sign() * w.abs() ** power + shift) * scale
    w[1, :128] = 0
    w[2, 128:] = w[2, 128]  # all alike
    importance = normal(256, seed=seed + 1).abs() ** 4 if weighted else None
    found = group_errors(search_int4(w, importance), w, 1.0 if importance is None else importance)
    plain = group_errors(quantize(w, "int4"), w, 1.0 if importance is None else importance)
    assert (found <= plain * (1 + 1e-5)).all()


def test_normal_groups_come_near_the_best_there_is():
    """Compares a few groups with an exhaustive search over fine steps of range and zero point."""
    w = normal(24, 128, seed=1)
    best = torch.full((24, 1), float("inf"), dtype=torch.float64)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    for share in torch.linspace(0.6, 1.02, 43):
        scale = ((high - low) / 15 * share).bfloat16().float()
        for shift in torch.arange(-48, 49) / 16:
            zero = (((-low / scale + shift) * 16).round() / 16).clamp(0, 255 / 16)
            q = (w / scale + zero).round().clamp(0, 15)
            best = torch.minimum(best, ((q - zero) * scale - w).square().double().sum(-1, keepdim=True))
    plain, found = group_errors(quantize(w, "int4"), w), group_errors(search_int4(w), w)
    grouped = group_errors(search_int4(w, starts=MANY_STARTS, rounds=MANY_ROUNDS), w)
    assert found.sum() < 1.08 * best.sum() < 0.95 * plain.sum()
    assert grouped.sum() < 1.05 * best.sum()


def test_an_outlier_is_cut_off_by_hand():
    """127 numbers are integers from -7 to 7, and one is 7.5. A scale of 1 keeps the integers exact."""
    w = torch.arange(-7, 8).repeat(9)[:128].float()
    w[127] = 7.5
    found = search_int4(w[None], starts=MANY_STARTS, rounds=MANY_ROUNDS)
    assert (found.scale.item(), found.zero.item()) == (1.0, 7 * 16)
    error = group_errors(found, w[None])
    assert error.item() == 0.25
    assert error.item() < group_errors(quantize(w[None], "int4"), w[None]).item() / 4


def test_importance_goes_first():
    w, importance = normal(64, 256), torch.full((256,), 1e-3)
    importance[::16] = 1.0
    chosen, even = search_int4(w, importance), search_int4(w)
    assert group_errors(chosen, w, importance).sum() < 0.8 * group_errors(even, w, importance).sum()
    assert group_errors(chosen, w).sum() > group_errors(even, w).sum()
    same = search_int4(w, torch.full((256,), 3.0))
    assert group_errors(same, w).sum() <= group_errors(even, w).sum() * 1.001


def test_stacks_cuts_and_dtypes():
    w = normal(3, 40, 512).bfloat16()
    whole = search_int4(w)
    assert torch.equal(dequantize(search_int4(w[1])), dequantize(whole)[1])
    assert torch.equal(dequantize(search_int4(w[:, 7:20, 128:384])), dequantize(whole)[:, 7:20, 128:384])
    assert torch.equal(dequantize(search_int4(w)), dequantize(whole))
    with pytest.raises(ConfigError, match="int4 scales 128 numbers together"):
        search_int4(normal(4, 192))


def inputs(n, seed, features=256):
    """Inputs as networks have them: features of different size, a few strong common directions, and a mean."""
    g = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    sizes = (0.5 * torch.randn(features, generator=fixed)).exp()
    directions = torch.randn(4, features, generator=fixed)
    x = torch.randn(n, features, generator=g) + 3 * torch.randn(n, 4, generator=g) @ directions
    return (x + torch.randn(features, generator=fixed)) * sizes


def output_error(packed, w, x):
    return float(((dequantize(packed) - w) @ x.T).square().sum())


@pytest.mark.parametrize(("n", "share"), [(32, 0.95), (256, 0.7), (4096, 0.4)])
def test_gptq_beats_rounding_on_inputs_it_has_not_seen(n, share):
    w, seen, unseen = normal(64, 256), inputs(n, 1), inputs(2048, 2)
    hessian = seen.T @ seen
    nearest = search_int4(w, hessian.diagonal(), starts=MANY_STARTS, rounds=MANY_ROUNDS)
    found = gptq(w, "int4", hessian, n)
    assert output_error(found, w, unseen) < share * output_error(nearest, w, unseen)
    assert output_error(found, w, unseen) < share * output_error(search_int4(w), w, unseen)
    # The scale of the inputs makes no difference.
    assert torch.equal(gptq(w, "int4", hessian * 4, n).data, found.data)


def test_gptq_without_correlation_is_rounding_with_searched_scales():
    w = normal(16, 256)
    found = gptq(w, "int4", torch.eye(256) * 7, 1000)
    want = search_int4(w, starts=MANY_STARTS, rounds=MANY_ROUNDS)
    assert torch.equal(dequantize(found), dequantize(want))


def test_gptq_spreads_an_error_by_hand():
    """Two features are always equal, so the second weight can make up for the rounding error of the first."""
    w = torch.zeros(1, 128)
    w[0, 2:18] = torch.arange(-7, 9)  # the scale is 1, the zero point whole
    w[0, 0], w[0, 1] = 0.4, 0.3
    x = torch.eye(128) * 10
    x[0, 1] = x[1, 0] = 10
    hessian = x.T @ x
    found = dequantize(gptq(w, "int4", hessian, 10**6))
    assert torch.equal(found[0, 2:18], w[0, 2:18])
    assert found[0, :2].sum() == 1.0  # close to 0.7 in all; rounding each alone gives 0


def test_int8_keeps_its_scales_and_gains_most_where_an_input_is_huge():
    """One feature is far larger than the others and correlated with them, like a network's massive activations."""
    w, seen, unseen = normal(64, 256), inputs(4096, 1), inputs(2048, 2)
    for x in (seen, unseen):
        x[:, 17] = 300 + 30 * x[:, :8].sum(1)
    plain, found = quantize(w, "int8"), gptq(w, "int8", seen.T @ seen, 4096)
    assert torch.equal(found.scale, plain.scale)
    assert found.data.min() >= -127
    assert output_error(found, w, unseen) < 0.5 * output_error(plain, w, unseen)
    steps = (dequantize(found) - w) / found.scale[:, None]
    assert steps[:, 17].abs().max() <= 0.5 + 1e-3  # it is rounded first, so it takes no errors of others
    assert torch.equal(dequantize(gptq(w, "int8", torch.eye(256), 10**6)), dequantize(plain))
    assert torch.equal(gptq(w, "int8", torch.zeros(256, 256), 0).data, plain.data)


def test_gptq_of_nothing_is_the_search():
    w = normal(8, 256)
    want = dequantize(search_int4(w, starts=MANY_STARTS, rounds=MANY_ROUNDS))
    assert torch.equal(dequantize(gptq(w, "int4", torch.zeros(256, 256), 0)), want)
    assert torch.equal(dequantize(gptq(w, "int4", torch.full((256, 256), float("nan")), 5)), want)
    with pytest.raises(ConfigError, match="int4 scales 128 numbers together"):
        gptq(normal(4, 192), "int4", torch.eye(192), 9)


def test_features_that_never_came_do_no_harm():
    w, x = normal(32, 256), inputs(512, 3)
    x[:, 100:140] = 0
    found = gptq(w, "int4", x.T @ x, 512)
    error = (dequantize(found) - w)[:, 100:140]
    assert error.abs().max() < w.abs().max()
    assert output_error(found, w, x) < 0.5 * output_error(search_int4(w), w, x)


@pytest.mark.parametrize("n", [16, 1000])
def test_the_inverse_root_is_one(n):
    x = inputs(n, 4).double()
    hessian = x.T @ x
    upper = inverse_root(hessian.float(), 0.05).double()
    damped = hessian / hessian.diagonal().mean() + 0.05 * torch.eye(256)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(256).double(), rtol=0, atol=2e-3)
    assert torch.equal(upper, upper.triu())


def test_few_inputs_are_trusted_less():
    assert damping_for(4096, 10**6) == DAMPING_LEAST
    assert damping_for(4096, 4096) == 0.1
    assert damping_for(4096, 3) == DAMPING_MOST
    assert damping_for(4096, 0) == DAMPING_MOST
