"""A parameter's copy in the dtype of the products is the cast of its values of now, whatever has written them."""

import pytest
import torch
from torch import nn

from accessory.ops.compute_copy import copy_of, in_dtype, keep_copy, refresh

BF16 = torch.bfloat16


def parameter(copied=True):
    p = nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
    if copied:
        keep_copy(p, BF16)
    return p


def by_torchs_optimizer(p):
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], 0.1, foreach=False).step()


def load(p):
    module = nn.Module()
    module.weight = p
    module.load_state_dict({"weight": torch.full_like(p, 3.0)})


def give_other_memory(p):
    p.data = torch.full_like(p, 4.0)


WRITES = {
    "copy_": lambda p: p.copy_(torch.ones_like(p)),
    "detach": lambda p: p.detach().view(-1)[3:5].fill_(9.0),
    "foreach": lambda p: torch._foreach_add_([p], 1.0),
    "init": lambda p: nn.init.zeros_(p),
    "torch's optimiser": by_torchs_optimizer,
    "load_state_dict": load,
    "other memory": give_other_memory,
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("how", ["when it is needed", "before a replay"])
def test_what_changes_a_parameter_changes_its_copy(write, how):
    p = parameter()
    before = in_dtype(p, BF16).detach().clone()
    place = copy_of(p).tensor.data_ptr()
    with torch.no_grad():
        WRITES[write](p)
    if how == "before a replay":
        refresh([p])
        got = copy_of(p).tensor
    else:
        got = in_dtype(p, BF16)
    assert torch.equal(got, p.detach().to(BF16))
    assert not torch.equal(got, before)
    assert got.data_ptr() == place


def test_nothing_is_cast_again_while_the_parameter_stays_what_it_is():
    p = parameter()
    in_dtype(p, BF16)
    copy_of(p).tensor.fill_(2.0)
    assert (in_dtype(p, BF16) == 2.0).all()
    copy_of(p).forget()
    assert torch.equal(in_dtype(p, BF16), p.to(BF16))


def test_a_copy_that_a_kernel_wrote_is_taken_until_the_next_write():
    p = parameter()
    with torch.no_grad():
        p.add_(1.0)
        copy_of(p).tensor.copy_(p)
    version = copy_of(p).tensor._version
    copy_of(p).written(p)
    assert torch.equal(in_dtype(p, BF16), p.to(BF16))
    assert copy_of(p).tensor._version == version
    with torch.no_grad():
        p.add_(1.0)
    assert torch.equal(in_dtype(p, BF16), p.to(BF16))


@pytest.mark.parametrize("grad_dtype", [torch.float32, BF16])
def test_the_gradient_is_that_of_a_cast(grad_dtype):
    found = []
    for copied in (True, False):
        p = parameter(copied)
        p.grad_dtype = grad_dtype
        for factor in (1.0, 2.0):
            (in_dtype(p, BF16) * factor).float().square().sum().backward()
        found.append(p.grad)
    assert found[0].dtype == grad_dtype
    assert torch.equal(*found)


def test_a_pass_whose_copy_was_written_over_is_refused():
    """Backward would read other weights than forward did."""
    p = parameter()
    x = torch.randn(2, 7, dtype=BF16, requires_grad=True)
    y = nn.functional.linear(x, in_dtype(p, BF16))
    with torch.no_grad():
        p.add_(1.0)
    refresh([p])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_copy_keeps_its_place_when_it_is_asked_for_twice():
    p = parameter()
    copy = copy_of(p)
    keep_copy(p, BF16)
    assert copy_of(p) is copy
    assert in_dtype(p, torch.float32) is p
    assert in_dtype(p, torch.float16).dtype == torch.float16
