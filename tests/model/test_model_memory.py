"""What the planner is asked of a loaded model."""

import torch
from helpers.plans import running

from accessory.model.memory import ModelMemory
from accessory.planner.peak import estimate


def test_a_step_takes_what_the_plan_says_beside_weights_and_cache():
    memory = ModelMemory(running(quant="int4"), torch.device("cuda"))
    terms = estimate(running(quant="int4", context=4096)).terms
    kept = {"weights", "key/value cache", "CUDA context, collectives"}
    assert memory.step_bytes(4096) == sum(n for name, n in terms.items() if name not in kept)
    assert memory.step_bytes(4096) > terms["activations"] > 1e9
    assert memory.step_bytes(32768) == memory.step_bytes(4097)  # a longer prompt takes several steps
