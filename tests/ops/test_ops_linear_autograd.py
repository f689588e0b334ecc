"""Products that are differentiated together against products one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from accessory.ops.linear_autograd import projections


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


def make(trained=(True, True, True), x_trained=True):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 8, generator=g, dtype=torch.float64).requires_grad_(x_trained)
    weights = [torch.randn(out, 8, generator=g, dtype=torch.float64) for out in (6, 4, 2)]
    for weight, wants in zip(weights, trained, strict=True):
        weight.requires_grad_(wants)
    return x, weights, [torch.randn(2, 5, len(w), generator=g, dtype=torch.float64) for w in weights]


@pytest.mark.parametrize(
    ("trained", "x_trained"), [((True, True, True), True), ((False, True, False), True), ((True, False, True), False)]
)
def test_values_and_gradients_are_those_of_single_products(trained, x_trained):
    x, weights, dys = make(trained, x_trained)
    parts = projections(x, weights)
    want = [F.linear(x, weight) for weight in weights]
    assert all(torch.equal(part, whole) for part, whole in zip(parts, want, strict=True))
    leaves = [t for t in (x, *weights) if t.requires_grad]
    torch.autograd.backward(parts, dys)
    got = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    for whole, dy in zip(want, dys, strict=True):
        if whole.requires_grad:
            whole.backward(dy)
    for gradient, leaf in zip(got, leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad)
    assert all(w.grad is None for w, wants in zip(weights, trained, strict=True) if not wants)


def test_a_part_without_a_gradient_counts_as_zero():
    x, weights, dys = make()
    torch.autograd.backward(projections(x, weights)[1], dys[1])
    torch.testing.assert_close(x.grad, dys[1] @ weights[1].detach())
    assert not weights[0].grad.any()
    assert weights[1].grad.any()


def test_the_inputs_gradient_is_summed_while_those_of_weights_are_made():
    x, weights, dys = make()
    counts, products = [], Products()

    def begin(dx):
        before = products.count
        dx.mul_(2)
        return lambda: counts.append((before, products.count - before))

    whole = sum(dy @ w.detach() for dy, w in zip(dys, weights, strict=True))
    parts = projections(x, weights, begin)
    with products:
        torch.autograd.backward(parts, dys)
    assert counts == [(3, 3)]  # the input's gradient before the sum begins, those of three weights before the wait
    torch.testing.assert_close(x.grad, 2 * whole)
    torch.testing.assert_close(weights[2].grad, dys[2].flatten(0, 1).t() @ x.detach().flatten(0, 1))


def test_an_input_that_wants_no_gradient_is_not_summed():
    x, weights, dys = make(x_trained=False)
    torch.autograd.backward(projections(x, weights, lambda dx: pytest.fail("summed")), dys)
    assert weights[0].grad.any()
