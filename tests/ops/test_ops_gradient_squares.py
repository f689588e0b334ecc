"""Sums of a gradient's squares are given out while the gradient is what its kernel wrote, and never afterwards."""

import math

import pytest
import torch
from helpers.training import batches, make_decoder
from torch import nn

from accessory.ops import dense_products, dispatch, gradient_squares
from accessory.ops.gradient_squares import GradientSquares, squares_for, squares_of_gradient
from accessory.parallel.fsdp import squared_norm
from accessory.parallel.mesh import DeviceMesh
from accessory.train.trainer import LossWeights, Trainer

SHAPE = (2, 70, 3)


@pytest.fixture
def parameter(monkeypatch):
    monkeypatch.setattr(gradient_squares, "FEWEST", 1)
    return nn.Parameter(torch.zeros(SHAPE))


def write(parameter, gradient):
    """What a kernel does: the gradient, and its squares beside it."""
    squares = squares_for(parameter)
    squares.buffer(SHAPE, gradient.device)[0] = gradient.square().sum()
    squares.record(gradient)
    return gradient


class Written(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter):
        ctx.parameter = parameter
        return parameter.sum()

    @staticmethod
    def backward(ctx, _):
        return write(ctx.parameter, torch.full(SHAPE, 2.0))


def test_autograd_passes_the_gradient_on_as_it_is(parameter):
    Written.apply(parameter).backward()
    assert float(squares_of_gradient(parameter)) == 4.0 * math.prod(SHAPE)
    Written.apply(parameter).backward()  # autograd adds it
    assert squares_of_gradient(parameter) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.mul_(2.0),
        lambda g: g.detach().copy_(torch.ones(SHAPE)),
        lambda g: g[0].zero_(),
        lambda g: torch._foreach_mul_([g], 2.0),
    ],
)
def test_a_gradient_that_was_changed_has_none(parameter, change):
    parameter.grad = write(parameter, torch.ones(SHAPE))
    assert squares_of_gradient(parameter) is not None
    change(parameter.grad)
    assert squares_of_gradient(parameter) is None


def test_another_gradient_has_none_wherever_it_lies(parameter):
    places = set()
    for _ in range(20):
        parameter.grad = write(parameter, torch.ones(SHAPE))
        places.add(parameter.grad.data_ptr())
        parameter.grad = None
        parameter.grad = torch.ones(SHAPE)  # mostly in the same memory
        places.add(parameter.grad.data_ptr())
        assert squares_of_gradient(parameter) is None
    assert len(places) < 40


def test_where_a_kernel_sums_nothing_they_are_not_trusted_again(parameter):
    parameter.grad = write(parameter, torch.ones(SHAPE))
    squares_for(parameter).disable()
    write(parameter, parameter.grad)
    assert squares_of_gradient(parameter) is None


def test_there_is_room_for_every_tile():
    squares = GradientSquares()
    assert squares.buffer(SHAPE, torch.device("cpu")).shape == (2 * 2 * 1,)
    assert squares.buffer(SHAPE, torch.device("cpu")) is squares.sums


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("implementation", ["base", "sparse"])
def test_the_norm_is_the_same(implementation, accumulated, monkeypatch):
    """With a kernel that sums squares, as a GPU's does, and without."""

    def norm():
        trainer = Trainer(make_decoder(implementation), DeviceMesh(), LossWeights(0.1))
        trainer.forward_backward(batches(0) * accumulated)
        known = sum(squares_of_gradient(p) is not None for p in trainer.decoder.parameters())
        return float(squared_norm(trainer.decoder, DeviceMesh())), known

    def with_squares(dy, x, counts, dtype, out, adds, squares):
        gradient = dense_products.grouped_loop_weights(dy, x, counts, dtype, out, adds)
        squares.zero_()
        squares[-1] = gradient.square().sum()
        return gradient

    plain, known = norm()
    assert known == 0
    kernel = dispatch.Kernel("grouped_weights", "", squares=True)
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda p: kernel if p.op == "grouped_weights" else choose(p))
    monkeypatch.setattr(dispatch.Kernel, "load", lambda k: with_squares if k is kernel else dispatch._load(k.function))
    monkeypatch.setattr(gradient_squares, "FEWEST", 1)
    summed, known = norm()
    assert known >= 6, "the stacks of two layers"
    assert summed == pytest.approx(plain, rel=1e-6)
