"""Ranks that share the vocabulary: the loss and its gradients are those of the whole logits, which no rank makes."""

import pytest
import torch
import torch.nn.functional as F
from helpers.distributed import run_ranks

from accessory.ops import cross_entropy
from accessory.ops.cross_entropy import VocabularyPart, head_cross_entropy_sum

N, D, V = 23, 8, 30
IGNORED = -100
# Which labels are ignored, tokens, logits a piece, and rows that are widened at a time.
CASES = {
    "one piece": ([], N, 2**27, 1024),
    "pieces": ([0, 7, 22], N, 70, 3),
    "nothing learnt": (range(N), N, 70, 1024),
    "no rows": ([], 0, 70, 1024),
}
DTYPES = [torch.float32, torch.bfloat16]


def numbers(case, dtype):
    """h, weight, bias and labels. Two rows are far from the others: one label is nearly certain, one impossible."""
    generator = torch.Generator().manual_seed(3)
    ignored, tokens, _, _ = CASES[case]
    h, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((N, D), (V, D), (V,)))
    h[3:5] *= 30
    label = torch.randint(0, V, (N,), generator=generator)
    label[3], label[4] = (h[3] @ weight.T + bias).argmax(), (h[4] @ weight.T + bias).argmin()
    label[list(ignored)] = IGNORED
    return *(x.to(dtype) for x in (h[:tokens], weight, bias)), label[:tokens]


def on_ranks(rank, world, frozen):
    """(loss, loss without gradients, gradients) of each case: of h, and of this rank's weight and bias if trained."""
    import torch.distributed as dist

    from accessory.parallel.collectives import copy_to_ranks, stack_from_ranks
    from accessory.parallel.mesh import Ranks

    ranks, size = Ranks.of(dist.group.WORLD), V // world
    part = VocabularyPart(rank * size, size, lambda sums: stack_from_ranks(sums, ranks))
    out = {}
    for case, (_, _, cross_entropy.LOGITS_AT_ONCE, cross_entropy.ROWS) in CASES.items():
        for dtype in DTYPES:
            h, weight, bias, label = numbers(case, dtype)
            weight, bias = (x[part.first :][:size].clone().requires_grad_(not frozen) for x in (weight, bias))
            h.requires_grad_()

            def head(h, weight=weight, bias=bias):
                return F.linear(copy_to_ranks(h, ranks), weight, bias)

            parameters = [] if frozen else [weight, bias]
            with torch.no_grad():
                alone = head_cross_entropy_sum(h, label, head, parameters, part)
            loss = head_cross_entropy_sum(h, label, head, parameters, part)
            out[case, dtype] = loss.detach(), alone, torch.autograd.grad(loss * 0.5, [h, *parameters])
    return out


@pytest.mark.parametrize(("world", "frozen"), [(2, False), (3, False), (2, True)])
def test_a_cut_vocabulary_has_the_loss_of_the_whole(world, frozen):
    """torch's cross-entropy of the whole logits in fp64; in bf16, logits and their gradients are rounded."""
    results = run_ranks(on_ranks, world, frozen)
    for key, (loss, _, _) in results[0].items():
        case, dtype = key
        *inputs, label = numbers(case, dtype)
        h, weight, bias = (x.double().requires_grad_() for x in inputs)
        want = F.cross_entropy(F.linear(h, weight, bias), label, reduction="sum")
        want_h, *want_parameters = torch.autograd.grad(want * 0.5, [h, weight, bias])
        bound = 1e-6 if dtype == torch.float32 else 1e-2
        assert loss.item() == pytest.approx(want.item(), rel=bound, abs=bound), key
        for rank, result in enumerate(results):
            own, alone, (got_h, *got_parameters) = result[key]
            assert torch.equal(own, loss), "ranks must agree to the bit, or they step apart"
            assert torch.equal(alone, own), key
            wanted = [want_h, *(x.chunk(world)[rank] for x in want_parameters if not frozen)]
            for got, there in zip([got_h, *got_parameters], wanted, strict=True):
                assert got.dtype == dtype
                assert (got - there).norm() <= bound * there.norm(), (key, rank)
