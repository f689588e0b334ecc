"""Several ranks in the mode in which a request's bits depend on nothing but the request."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from helpers.distributed import run_ranks
from helpers.random_models import write_speaking
from helpers.sizes import SPEAKING

from accessory.engine.sampling_params import SamplingParams
from accessory.model.meta import MetaModel
from accessory.ops import dispatch
from accessory.parallel import collectives
from accessory.parallel.mesh import Ranks


def summed(rank, world):
    """A large sum in the mode, and the same numbers as parts of sums of other sizes."""
    ranks = Ranks.of(dist.new_group(ranks=list(range(world))))
    x = torch.randn(3, collectives.GATHERED_AT_MOST, generator=torch.Generator().manual_seed(rank))
    with dispatch.fixing("prompt"):
        whole = collectives.reduce_from_ranks(x, ranks)
        parts = torch.cat([collectives.reduce_from_ranks(part, ranks) for part in (x[:1], x[1:2, :7], x[1:2, 7:])], -1)
    return torch.equal(parts.flatten(), whole[:2].flatten()), whole.double().sum().item()


def test_sums_over_ranks_have_one_order_at_any_size():
    found = run_ranks(summed, 4)
    assert all(same for same, _ in found)
    assert len({total for _, total in found}) == 1


def answered(rank, world, folder, implementation):
    group = dist.new_group(ranks=list(range(world)))
    model = MetaModel.from_pretrained(
        folder, f"mixtral{implementation}", mp_group=group, device="cpu", max_seq_len=400, deterministic=True
    )
    r = random.Random(0)
    prompts = [[1, *(r.randrange(3, 32000) for _ in range(n))] for n in (3, 300, 70, 200, 5)]
    how = {"max_gen_len": 10, "params": SamplingParams(logprobs=0)}
    together = model.complete(prompts, **how)
    alone = [model.complete([prompt], **how)[0] for prompt in prompts]
    return [(a.token_ids, a.logprobs) == (b.token_ids, b.logprobs) for a, b in zip(together, alone, strict=True)]


@pytest.mark.parametrize("implementation", ["_sparse", pytest.param("", marks=pytest.mark.slow)])
def test_two_ranks_give_each_prompt_what_it_gets_alone(tmp_path, implementation):
    write_speaking(tmp_path, SPEAKING)
    for found in run_ranks(answered, 2, tmp_path, implementation):
        assert found == [True] * 5
