"""A sharded network in training: the bytes of a step, and that nothing of it outlives it."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from helpers.distributed import run_ranks
from helpers.plans import finetuning
from helpers.training import ARGS, batches, make_decoder

from accessory.parallel import sharded
from accessory.parallel.mesh import DeviceMesh, Ranks
from accessory.parallel.sharded import ShardedParameter
from accessory.planner.training import _gathered
from accessory.planner.weights import tensor_groups
from accessory.train.trainer import LossWeights, Trainer

FOUR_LAYERS = ARGS.replace(n_layers=4)


def bytes_of_a_step(rank, world, cases):
    """The most bytes of whole weights, and of gradients on their way, while a network makes a step."""
    now, most, found = Counter(), Counter(), []

    def count(what, more):
        now[what] += more
        most[what] = max(most[what], now[what])

    class Counted(ShardedParameter):
        def unshard(self):
            before = self.size_now()
            super().unshard()
            count("whole", self.size_now() - before)

        def size_now(self):
            return 0 if self.unsharded is None else self.unsharded.untyped_storage().size()

        def reshard(self):
            count("whole", -self.size_now())
            super().reshard()

        def wait_for_reduce(self):
            count("leaving", -sum(by_rank.numel() * by_rank.element_size() for _, _, by_rank in self._reducing))
            super().wait_for_reduce()

        def reduce(self):
            count("leaving", self.unsharded.grad.numel() * self.unsharded.grad.element_size())
            super().reduce()

    sharded.ShardedParameter = Counted
    mesh = DeviceMesh.of(Ranks.of(torch.distributed.group.WORLD), 1, "cpu")
    for mode, gradient_dtype in cases:
        most.clear()
        decoder = make_decoder(
            "sparse", mesh, mode, dtype=torch.bfloat16, args=FOUR_LAYERS, gradient_dtype=gradient_dtype
        )
        trainer = Trainer(decoder, mesh, LossWeights(0.1))
        for step in range(2):
            trainer.step(batches(step), 1e-3)
        assert not now["leaving"]
        found.append((most["whole"], most["leaving"], now["whole"] / most["whole"]))
        now.clear()
    return found


def test_the_planner_counts_what_is_whole():
    cases = [("sdp", torch.float32), ("fsdp", torch.bfloat16)]
    wanted = []
    for mode, gradient_dtype in cases:
        name = "bf16" if gradient_dtype == torch.bfloat16 else "fp32"
        setup = finetuning(FOUR_LAYERS, kind="full", dp=2, data_parallel=mode, gradient_dtype=name)
        groups = list(tensor_groups(setup))
        in_layers = sum(g.numel for g in groups if g.in_layer and g.role != "fp32")
        summed = 2 * in_layers // FOUR_LAYERS.n_layers
        # Gradients: a layer's that are summed, and those that the next one has just made.
        wanted.append((_gathered(setup, setup.task, groups) - summed, 2 * summed))
    for found in run_ranks(bytes_of_a_step, 2, cases):
        assert [(whole, leaving) for whole, leaving, _ in found] == wanted
        # Between steps there is what the next one needs first: in sdp all, in fsdp less than in a step.
        assert found[0][2] == 1.0
        assert 0.0 < found[1][2] < 1.0


def what_outlives_a_network(rank, world, mode):
    mesh = DeviceMesh.of(Ranks.of(torch.distributed.group.WORLD), 1, "cpu")
    decoder = make_decoder("sparse", mesh, mode, dtype=torch.bfloat16)
    trainer = Trainer(decoder, mesh, LossWeights(0.1))
    trainer.step(batches(0), 1e-3)
    there = {name: weakref.ref(p) for name, p in [("", decoder), *decoder.named_parameters()]}
    del decoder, trainer
    gc.collect()
    return [name for name, reference in there.items() if reference() is not None]


@pytest.mark.parametrize("mode", ["sdp", "fsdp"])
def test_nothing_outlives_a_network(mode):
    """Hooks of gradients would keep its memory: Python cannot see who holds them."""
    assert run_ranks(what_outlives_a_network, 2, mode) == [[]] * 2
