"""The experts' forward and backward as one operation, against autograd through the products one by one."""

import pytest
import torch
from helpers.trained_experts import WAYS, E, F, K, T, agree, case, gradients, leaves, single_products

from accessory.ops import experts_autograd
from accessory.ops.experts import grouped_experts
from accessory.ops.experts_autograd import trained_experts
from accessory.ops.stack_gradients import StackGradients


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_of_single_products(way, recompute):
    inputs = case(**WAYS[way])
    want, want_gradients = gradients(single_products, *inputs)
    got, got_gradients = gradients(trained_experts, *inputs, recompute=recompute)
    assert got.dtype == torch.float32
    agree([got, *got_gradients], [want, *want_gradients])


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("way", ["dense", "all"])
def test_experts_of_other_ranks_add_nothing(way, first):
    x, stacks, weight, expert = case(experts=2, **WAYS[way])
    inside = ((expert >= first) & (expert < first + 2)).float()
    local = (expert - first).clamp(0, 1)
    got, got_gradients = gradients(trained_experts, x, stacks, weight, expert, first=first)
    y = grouped_experts(x, *stacks, weight * inside, local)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    want_gradients = torch.autograd.grad((y * pull).sum(), leaves(x, stacks, weight))
    agree([got, *got_gradients], [y, *want_gradients])


def test_a_rank_without_pairs_gives_zeros():
    x, stacks, weight, expert = case(experts=1, lora=True, bias=True)
    got, got_gradients = gradients(trained_experts, x, stacks, weight, torch.zeros_like(expert), first=3)
    assert not got.any()
    assert not any(g.any() for g in got_gradients)


def test_an_idle_expert_has_a_zero_gradient():
    x, stacks, weight, expert = case(lora=True, bias=True)
    _, found = gradients(trained_experts, x, stacks, weight, torch.tensor([[0, 2]]).expand_as(expert))
    for gradient in found[2:]:
        assert not gradient[[1, 3]].any()
        assert gradient[0].any()
        assert gradient[2].any()


def test_only_what_is_trained_gets_gradients():
    x, stacks, weight, expert = case(lora=True)
    for w in stacks:
        w.weight.requires_grad_(False)
    trained_experts(x, *stacks, weight, expert).sum().backward()
    assert all(w.weight.grad is None and w.lora_a.grad is not None for w in stacks)


def test_gradients_of_micro_batches_add_up():
    """The second one is written on top of the first one's; a hook on a gradient sees to it that autograd adds it."""
    inputs = [case(lora=True, seed=s) for s in (0, 1)]
    x, stacks, weight, _ = inputs[0]
    for w in stacks:
        w.lora_b.register_hook(lambda grad: None)
    for other in inputs:
        trained_experts(other[0], *stacks, other[2], other[3]).square().sum().backward()
    want = [torch.zeros_like(t) for t in leaves(x, stacks, weight)[2:]]
    for other in inputs:
        y = grouped_experts(other[0], *stacks, other[2], other[3]).square().sum()
        for total, part in zip(want, torch.autograd.grad(y, leaves(x, stacks, weight)[2:]), strict=True):
            total += part
    agree([t.grad for t in leaves(x, stacks, weight)[2:]], want)


def test_trained_weights_of_fp32_are_multiplied_in_the_inputs_dtype():
    x, stacks, weight, expert = case()
    y = trained_experts(x.bfloat16(), *stacks, weight, expert)
    (gradient,) = torch.autograd.grad(y.sum(), [stacks[0].weight])
    assert gradient.dtype == torch.float32
    want = torch.autograd.grad(grouped_experts(x, *stacks, weight, expert).sum(), [stacks[0].weight])[0]
    assert (gradient - want).norm() <= 0.02 * want.norm()


def test_backward_works_once():
    x, stacks, weight, expert = case()
    y = trained_experts(x, *stacks, weight, expert).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="works once"):
        y.backward()


def test_what_is_kept_is_two_tensors_of_the_hidden_size():
    x, stacks, weight, expert = case()
    y = trained_experts(x, *stacks, weight, expert)
    kept = [t for t in y.grad_fn.inner if t is not None]
    assert [tuple(t.shape) for t in kept] == [(T * K, F)] * 2
    assert trained_experts(x, *stacks, weight, expert, recompute=True).grad_fn.inner is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("at_once", [experts_autograd.TRAINED_PAIRS_AT_ONCE, 8])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("first", [None, 1])
@pytest.mark.parametrize("way", WAYS)
def test_in_bf16_on_a_gpu(way, first, recompute, at_once, monkeypatch):
    """Against fp32 on the CPU. Kernels there take 16 bits, sort no rows of other ranks and sum in other orders."""
    options = WAYS[way]
    x, stacks, weight, expert = case(experts=E if first is None else 2, **options)
    want, want_gradients = gradients(trained_experts, x, stacks, weight, expert, first=first)

    def there(t):
        if t is None or isinstance(t, torch.Tensor):
            return None if t is None else t.detach().cuda().requires_grad_(t.requires_grad)
        return t.map(lambda part: part.cuda())

    monkeypatch.setattr(experts_autograd, "TRAINED_PAIRS_AT_ONCE", at_once)
    moved = [w._replace(**{f: there(getattr(w, f)) for f in ("weight", "bias", "lora_a", "lora_b")}) for w in stacks]
    x16, weight_TK = x.detach().cuda().bfloat16().requires_grad_(), there(weight)
    poison = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(8)]
    del poison
    y = trained_experts(x16, *moved, weight_TK, expert.cuda(), first=first, recompute=recompute)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).cuda()
    got_gradients = torch.autograd.grad((y * pull).sum(), leaves(x16, moved, weight_TK))
    for ours, theirs in zip([y, *got_gradients], [want, *want_gradients], strict=True):
        assert (ours.float().cpu() - theirs).norm() <= 2.5e-2 * theirs.norm()


@pytest.mark.parametrize("at_once", [experts_autograd.TRAINED_PAIRS_AT_ONCE, 8])
@pytest.mark.parametrize("recompute", [False, True])
def test_ranks_sum_the_inputs_gradient_while_those_of_weights_are_made(at_once, recompute, monkeypatch):
    monkeypatch.setattr(experts_autograd, "TRAINED_PAIRS_AT_ONCE", at_once)
    happened, add = [], StackGradients.add

    def noted(self, stack, *args):
        happened.append(f"w{stack + 1}")
        add(self, stack, *args)

    def begin(dx_TD):
        happened.append("begin")
        dx_TD.mul_(2)
        return lambda: happened.append("wait")

    x, stacks, weight, expert = case()
    alone = gradients(trained_experts, x, stacks, weight, expert, recompute=recompute)[1]
    monkeypatch.setattr(StackGradients, "add", noted)
    summed = gradients(trained_experts, x, stacks, weight, expert, recompute=recompute, sum_over_ranks=begin)[1]
    assert happened[-4:] == ["begin", "w3", "w1", "wait"]
    assert happened.count("begin") == 1
    assert torch.equal(summed[0], 2 * alone[0])
    assert all(torch.equal(a, b) for a, b in zip(summed[1:], alone[1:], strict=True))
