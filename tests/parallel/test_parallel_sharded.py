"""Sharded parameters: what is whole when, what is sent, and that gradients are sums in the dtype that was asked for."""

from collections import Counter

import pytest
import torch
from helpers.distributed import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from accessory.parallel import sharded
from accessory.parallel.local_shard import local
from accessory.parallel.sharded import ShardedChain, ShardedLayer, ShardedParameter

D, LAYERS = 4, 4


class Block(nn.Module):
    """Two weights, of which one is cut along its last dimension, and none of which is read but in here."""

    def __init__(self, recompute=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))
        self.odd = nn.Parameter(torch.randn(3, D))
        self.recompute = recompute

    def forward(self, x):
        return checkpoint(self._inner, x, use_reentrant=False) if self.recompute else self._inner(x)

    def _inner(self, x):
        return x + (x @ self.weight.T).tanh() @ self.odd.T @ self.odd.to(x.dtype)


class Chain(nn.Module):
    def __init__(self, recompute=False):
        super().__init__()
        self.first = nn.Parameter(torch.randn(D))
        self.layers = nn.ModuleList(Block(recompute) for _ in range(LAYERS))

    def forward(self, x):
        x = x * self.first
        for layer in self.layers:
            x = layer(x)
        return x.float().square().sum()


def chain(stays, dtype=torch.float32, gradient_dtype=torch.float32, recompute=False, frozen=False, mesh=None):
    """The network, sharded over all ranks, and what holds its layers."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    network = Chain(recompute)
    if frozen:
        network.requires_grad_(False)
        network.layers[1].odd.requires_grad_(True)
    mesh = mesh or init_device_mesh("cpu", (torch.distributed.get_world_size(),))

    def cut(module, kind, dim):
        return ShardedParameter(module, kind, mesh, dim, dtype, gradient_dtype)

    layers = [ShardedLayer(m, [cut(m, "weight", 0), cut(m, "odd", 1)]) for m in network.layers]
    outside = ShardedLayer(network, [cut(network, "first", 0)])
    network.moved = ShardedChain(outside, layers, reshard_after_forward=not stays).moved
    network.outside = outside
    for p in network.parameters():
        p.grad_dtype = None  # in which it was summed
    return network, layers


def inputs(rank):
    return torch.randn(2, D, generator=torch.Generator().manual_seed(rank + 1))


def whole_gradients(network):
    return {name: p.grad.full_tensor() for name, p in network.named_parameters() if p.grad is not None}


def all_ways(rank, world):
    torch.manual_seed(0)
    plain = Chain()
    sum(plain(inputs(r)) for r in range(world)).backward()
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    for stays in (True, False):
        for recompute in (True, False):
            network, _ = chain(stays, recompute=recompute)
            parts = list(network.parameters())
            network(inputs(rank)).backward()
            found = whole_gradients(network)
            for name, gradient in wanted.items():
                torch.testing.assert_close(found[name], gradient, msg=f"{name}, {stays}, {recompute}")
            network(inputs(rank)).backward()  # a second micro-batch adds
            torch.testing.assert_close(whole_gradients(network)["layers.2.odd"], 2 * wanted["layers.2.odd"])
            with torch.no_grad():
                torch.testing.assert_close(network(inputs(rank)), plain(inputs(rank)))
            # Nobody went backward here, and then the weights changed.
            network(inputs(rank))
            with torch.no_grad():
                for part, p in zip(parts, plain.parameters(), strict=True):
                    local(part).mul_(0.5)
                    p.mul_(0.5)
                changed = plain(inputs(rank))
                for p in plain.parameters():
                    p.mul_(2.0)
            torch.testing.assert_close(network(inputs(rank)), changed)
            network, _ = chain(stays, recompute=recompute, frozen=True)
            network(inputs(rank)).backward()
            (name,) = found = whole_gradients(network)
            torch.testing.assert_close(found[name], wanted[name])
    return True


def test_gradients_are_sums_over_ranks_in_every_way():
    assert run_ranks(all_ways, 2) == [True] * 2


def life_of_weights(rank, world, stays):
    """What is gathered, and the most layers that are whole at once."""
    network, layers = chain(stays)
    gathered, most = Counter(), [0]

    def watch(i, layer):
        unshard = layer.unshard

        def asking():
            gathered[i] += not layer.gathering
            unshard()
            most[0] = max(most[0], sum(other.gathering for other in layers))

        layer.unshard = asking

    for i, layer in enumerate(layers):
        watch(i, layer)
    loss = network(inputs(rank))
    between = [layer.gathering for layer in layers]
    loss.backward()
    assert all(isinstance(p, DTensor) for p in network.parameters())
    sizes = {p.unsharded.untyped_storage().size() for layer in layers for p in layer.parameters}
    return [gathered[i] for i in range(LAYERS)], most[0], between, sizes


def test_a_layer_is_whole_while_it_runs():
    for result in run_ranks(life_of_weights, 2, False):
        # The last layer's weights stay, because its backward pass comes next.
        assert result == ([2] * (LAYERS - 1) + [1], 2, [False] * (LAYERS - 1) + [True], {0})


def test_all_layers_stay_whole_from_forward_to_backward():
    for result in run_ranks(life_of_weights, 2, True):
        assert result == ([1] * LAYERS, LAYERS, [True] * LAYERS, {0})


def dtypes(rank, world, cases):
    sent = []
    reduce = sharded.reduce_scatter_single

    def spied(out, gradient, **more):
        sent.append(gradient.dtype)
        return reduce(out, gradient, **more)

    sharded.reduce_scatter_single = spied
    out = []
    for dtype, gradient_dtype in cases:
        network, layers = chain(False, dtype, gradient_dtype)
        of_gradients = []
        for _ in range(2):  # micro-batches
            network(inputs(rank).to(dtype)).backward()
            of_gradients += {p.grad.dtype for p in network.parameters()}
        (of_whole,) = {p.unsharded.dtype for layer in layers for p in layer.parameters}
        (on_the_wire,) = set(sent)
        sent.clear()
        out.append((of_whole, on_the_wire, *of_gradients))
    return out


def test_weights_and_gradients_travel_in_16_bits_and_micro_batches_add_up_in_fp32():
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    wanted = [
        (bf16, bf16, bf16, fp32),
        (bf16, bf16, bf16, bf16),
        (fp16, fp32, fp32, fp32),  # sums of gradients may be too large for fp16
        (fp32, fp32, fp32, fp32),
        (fp32, bf16, bf16, bf16),
    ]
    assert run_ranks(dtypes, 2, [(whole, last) for whole, *_, last in wanted]) == [wanted] * 2


def ahead(rank, world, stays):
    """How often weights were gathered while an optimiser moved them, and afterwards in the next pass."""
    network, layers = chain(stays)
    network(inputs(rank)).backward()
    gathered, gather = [0], sharded.all_gather_single

    def spied(*args, **more):
        gathered[0] += 1
        return gather(*args, **more)

    sharded.all_gather_single = spied
    found = []
    for again in (False, True):
        for p in network.parameters():
            with torch.no_grad():
                local(p).mul_(0.5)
            network.moved(p)
        if again:  # written after it was asked for
            with torch.no_grad():
                local(network.layers[0].weight).mul_(0.5)
        counts = [gathered[0]]
        got = network(inputs(rank))
        counts.append(gathered[0] - counts[0])
        parts = {name: p.full_tensor() for name, p in whole_parts(network, layers)}
        plain = Chain()
        plain.load_state_dict(parts)
        torch.testing.assert_close(got, plain(inputs(rank)))
        got.backward()
        found.append(counts)
        gathered[0] = 0
    return found


def whole_parts(network, layers):
    """(name, part) of all parameters, whatever is whole now."""
    yield "first", network.outside.parameters[0].sharded
    for i, layer in enumerate(layers):
        for p in layer.parameters:
            yield f"layers.{i}.{p.kind}", p.sharded


@pytest.mark.parametrize("stays", [True, False])
def test_weights_that_were_moved_arrive_before_the_next_pass(stays):
    """Those of the first layer, or of all that stay whole. What was written since is gathered again."""
    every = 1 + 2 * LAYERS
    first = every if stays else 3
    for counts in run_ranks(ahead, 2, stays):
        assert counts == [[first, every - first], [first, every - first + 1]]


def no_copies(rank, world):
    """The tensors that are sent and received are the whole weight and gradient themselves."""
    network, layers = chain(True)
    places = []
    gather = sharded.all_gather_single

    def spied(out, own, **more):
        places.append((out.untyped_storage().data_ptr(), own.untyped_storage().data_ptr()))
        return gather(out, own, **more)

    sharded.all_gather_single = spied
    loss = network(inputs(rank))
    weights = {layer.parameters[0].unsharded.untyped_storage().data_ptr() for layer in layers}
    loss.backward()
    return weights <= {out for out, own in places if out == own}


@pytest.mark.parametrize("world", [2, 4])
def test_a_weight_arrives_in_its_place(world):
    assert run_ranks(no_copies, world) == [True] * world


class Pair(nn.Module):
    """Two weights of one shape, which each rank reads in an order of its own, or of which it reads one alone."""

    def __init__(self, order):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(D, D)), nn.Parameter(torch.ones(D, D))
        self.order = order

    def forward(self, x):
        for name in self.order:
            x = x + x @ getattr(self, name)
        return x


class Pairs(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.layers = nn.ModuleList(Pair(order) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def ranks_with_orders_of_their_own(rank, world, orders):
    from torch.distributed.device_mesh import init_device_mesh

    begun = []

    class Noted(ShardedParameter):
        def reduce(self):
            begun.append(self.kind)
            super().reduce()

    mesh = init_device_mesh("cpu", (world,))
    wanted = {}
    for order in orders:
        plain = Pairs(order)
        plain(torch.ones(1, D)).backward()
        for name, p in plain.named_parameters():
            wanted[name] = wanted.get(name, 0) + (0 if p.grad is None else p.grad)
    network = Pairs(orders[rank])
    layers = [
        ShardedLayer(m, [Noted(m, kind, mesh, 0, torch.float32, torch.float32) for kind in "ab"])
        for m in network.layers
    ]
    ShardedChain(ShardedLayer(network, []), layers, reshard_after_forward=True)
    for _ in range(2):
        network(torch.ones(1, D)).backward()
    found = whole_gradients(network)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], 2 * gradient)
    return begun


@pytest.mark.parametrize("orders", [("ab", "ba"), ("ab", "b"), ("a", "b")])
def test_ranks_begin_their_sums_in_one_order(orders):
    """Else a rank would add one weight's gradient to another's, or wait for a sum that nobody else begins."""
    assert run_ranks(ranks_with_orders_of_their_own, 2, orders) == [["b", "a"] * 4] * 2
