import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accessory.ops.routing import balance_loss, route, router_statistics


def statistics_of(logits_TE, k, counted_T=None):
    _, expert_TK, probability_TE = route(logits_TE, k)
    return router_statistics(logits_TE, probability_TE, expert_TK, counted_T)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_routing_is_that_of_transformers(k):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    router = MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=5, num_experts_per_tok=k))
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(40, 16)
    _, their_weight, their_expert = router(x_TD)
    weight_TK, expert_TK, _ = route(x_TD @ router.weight.T, k)
    torch.testing.assert_close(weight_TK, their_weight)
    assert torch.equal(expert_TK, their_expert)


def test_weights_of_a_hand_made_row():
    # The softmax of (ln 1, ln 2, ln 4, ln 3) is (1, 2, 4, 3)/10. The two largest are rescaled to 4/7 and 3/7.
    logits = torch.tensor([[1.0, 2.0, 4.0, 3.0]]).log()
    weight_TK, expert_TK, probability_TE = route(logits, 2)
    torch.testing.assert_close(probability_TE, torch.tensor([[0.1, 0.2, 0.4, 0.3]]))
    torch.testing.assert_close(weight_TK, torch.tensor([[4 / 7, 3 / 7]]))
    assert expert_TK.tolist() == [[2, 3]]


def test_bf16_logits_are_routed_in_fp32():
    weight_TK, _, probability_TE = route(torch.randn(3, 4).bfloat16(), 2)
    assert weight_TK.dtype == probability_TE.dtype == torch.float32


def test_balance_of_a_hand_made_batch():
    # Two tokens, three experts, top-1. p = (.5, .3, .2) and (.1, .6, .3): experts 0 and 1 get one token each.
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()
    stats = statistics_of(logits, 1)
    assert stats.count_E.tolist() == [1.0, 1.0, 0.0]
    torch.testing.assert_close(stats.probability_E, torch.tensor([0.6, 0.9, 0.5]))
    # E/(T·K) · Σ count · mean p = 3/2 · (1·0.3 + 1·0.45) = 1.125
    torch.testing.assert_close(balance_loss([stats]), torch.tensor(1.125))
    entropy = -(logits.exp() * logits).sum()
    torch.testing.assert_close(stats.entropy, entropy)
    torch.testing.assert_close(stats.z, torch.tensor(0.0), atol=1e-6, rtol=0)  # each row's softmax sums to one already


def test_layers_are_averaged_not_concatenated():
    a, b = torch.randn(12, 4), torch.randn(30, 4) * 3
    both = balance_loss([statistics_of(a, 2), statistics_of(b, 2)])
    alone = (balance_loss([statistics_of(a, 2)]) + balance_loss([statistics_of(b, 2)])) / 2
    torch.testing.assert_close(both, alone)


@given(st.integers(1, 4), st.integers(0, 1000))
def test_padding_never_counts(k, seed):
    generator = torch.Generator().manual_seed(seed)
    real, padding = torch.randn(9, 6, generator=generator), torch.randn(5, 6, generator=generator) * 5
    mixed = torch.cat([real, padding])
    counted = torch.tensor([True] * 9 + [False] * 5)
    order = torch.randperm(14, generator=generator)
    masked, alone = statistics_of(mixed[order], k, counted[order]), statistics_of(real, k)
    for name, a, b in zip(masked._fields, masked, alone, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert masked.count_E.sum() == 9 * k == masked.tokens * k


def test_perfect_balance_is_one():
    logits = torch.full((8, 4), -20.0)
    logits[torch.arange(8), torch.arange(8) % 4] = 0.0
    torch.testing.assert_close(balance_loss([statistics_of(logits, 1)]), torch.tensor(1.0))


def test_no_counted_token_gives_zero_and_a_zero_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    loss = balance_loss([statistics_of(logits, 2, torch.zeros(4, dtype=torch.bool))])
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().sum() == 0


def test_gradient_is_the_finite_difference():
    logits = torch.randn(7, 5, dtype=torch.float64)
    _, expert_TK, _ = route(logits, 2)

    def loss(x):
        # The same definition in fp64, with a fixed choice of experts.
        p = x.softmax(-1)
        counts = torch.zeros(5, dtype=torch.float64).index_add_(0, expert_TK.flatten(), torch.ones(14).double())
        return 5 / 14 * (counts * p.mean(0)).sum()

    x = logits.float().requires_grad_()
    balance_loss([statistics_of(x, 2)]).backward()
    step = 1e-6
    for t, e in ((0, 0), (3, 4), (6, 2)):
        bump = torch.zeros_like(logits)
        bump[t, e] = step
        slope = (loss(logits + bump) - loss(logits - bump)) / (2 * step)
        assert x.grad[t, e].item() == pytest.approx(slope.item(), abs=1e-5)
