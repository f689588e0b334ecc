"""The planner's counts of weights and of trained weights, against the network itself."""

from collections import Counter

import pytest
import torch
from helpers.plans import BOTH, CUTTABLE, TINY, finetuning, running

from accessory.adapt.peft import adapter_specs_for, add_adapters, trainable_rule
from accessory.config import PRESETS
from accessory.formats import FORMATS, Quant
from accessory.nn.decoder import Decoder
from accessory.parallel.apply import local_part
from accessory.planner.weights import is_trained, tensor_groups, trained_parameters, weight_bytes


@pytest.mark.parametrize(
    ("quant", "gb"), [(None, 93.41), ("int8", 46.87), ("fp8", 47.00), ("nf4", 26.65), ("int4", 24.84)]
)
def test_weights_of_mixtral(quant, gb):
    assert weight_bytes(running(quant=quant)) / 1e9 == pytest.approx(gb, abs=0.005)


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("name", ["8x7b", "8x22b"])
@pytest.mark.parametrize("implementation", BOTH)
def test_weights_are_those_that_quantizing_counts(quant, name, implementation):
    setup = running(PRESETS[name], quant, implementation=implementation)
    assert weight_bytes(setup) == Quant.parse(quant).nbytes(PRESETS[name])
    assert weight_bytes(running(PRESETS[name])) == Quant().nbytes(PRESETS[name])


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    "args",
    [
        TINY,
        CUTTABLE,
        CUTTABLE.replace(lora_rank=4, bias_tuning=True, lora_targets=("wq", "wo", "w2", "gate", "output")),
    ],
)
def test_a_rank_holds_what_cutting_the_network_leaves_it(args, implementation, world):
    if world > 2 and args is TINY:
        world = 2
    with torch.device("meta"):
        decoder = Decoder(args, implementation)
        add_adapters(decoder, adapter_specs_for(args))
    expected = Counter()
    for name, p in decoder.named_parameters():
        _, sizes = local_part(name, tuple(p.shape), args, implementation, 0, world)
        expected[kind_of(name)] += torch.Size(sizes).numel()
    found = Counter()
    for group in tensor_groups(running(args, implementation=implementation, tp=world)):
        found[kind_of(group.name)] += group.numel
    assert found == expected


def kind_of(name):
    return "lora" if "lora" in name else "bias" if name.endswith("bias") else "weight"


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_is_trained_follows_the_trainer_s_rule(kind, norms):
    args = TINY.replace(lora_rank=4 if kind == "lora" else -1, norm_tuning=norms)
    with torch.device("meta"):
        decoder = Decoder(args, "sparse")
        add_adapters(decoder, adapter_specs_for(args))
    rule = trainable_rule(args, kind == "lora")
    expected = sum(p.numel() for name, p in decoder.named_parameters() if rule(name))
    assert trained_parameters(finetuning(args, kind=kind)) == expected
    assert not any(is_trained(group, running(args)) for group in tensor_groups(running(args)))
