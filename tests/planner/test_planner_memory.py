"""What the planner says of weights, of what is trained and of the cache, against the network itself."""

import itertools
from collections import Counter

import pytest
import torch
from helpers.plans import BOTH, CUTTABLE, TINY, finetuning, running

from accessory.adapt.peft import adapter_specs_for, add_adapters, trainable_rule
from accessory.config import PRESETS
from accessory.engine.graphs import _power_of_two
from accessory.errors import ConfigError
from accessory.formats import FORMATS, Quant
from accessory.nn.cache import ContiguousCache
from accessory.nn.decoder import Decoder
from accessory.ops.quantized import packed_shapes
from accessory.parallel.apply import local_part
from accessory.planner.memory import (
    Formats,
    cache_bytes,
    cache_slots,
    is_trained,
    packed_bytes,
    pieces,
    trained_numbers,
    weight_bytes,
)


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


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 128), (7, 256), (96, 1024)])
def test_packed_bytes_are_those_of_the_tensors(format, shape):
    tensors = packed_shapes(format, shape).values()
    assert packed_bytes(format, *shape) == sum(torch.Size(s).numel() * dtype.itemsize for s, dtype in tensors)


def test_rows_without_whole_groups_are_refused_as_quantizing_does():
    for format, columns in itertools.product(FORMATS, (64, 96, 128, 192)):
        try:
            packed_shapes(format, (2, columns))
        except ConfigError:
            with pytest.raises(ConfigError, match=rf"^quant: {format} .* {columns}; use fewer ranks"):
                packed_bytes(format, 2, columns)
        else:
            packed_bytes(format, 2, columns)


def test_formats_are_read_as_quantizing_reads_them():
    choices = (None, "none", *FORMATS)
    for words in itertools.product(choices, repeat=3):
        theirs = Quant.parse(*words) or Quant()
        assert vars(Formats.of(*words)) == vars(theirs), words


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
        kind = "lora" if "lora" in name else "bias" if name.endswith("bias") else "weight"
        expected[kind] += torch.Size(sizes).numel()
    found = Counter()
    for piece in pieces(running(args, implementation=implementation, tp=world)):
        kind = "lora" if "lora" in piece.name else "bias" if piece.name.endswith("bias") else "weight"
        found[kind] += piece.numbers
    assert found == expected


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_is_trained_follows_the_trainer_s_rule(kind, norms):
    args = TINY.replace(lora_rank=4 if kind == "lora" else -1, norm_tuning=norms)
    with torch.device("meta"):
        decoder = Decoder(args, "sparse")
        add_adapters(decoder, adapter_specs_for(args))
    rule = trainable_rule(args, kind == "lora")
    expected = sum(p.numel() for name, p in decoder.named_parameters() if rule(name))
    assert trained_numbers(finetuning(args, kind=kind)) == expected
    assert not any(is_trained(p, running(args)) for p in pieces(running(args)))


def test_the_cache_takes_128_kib_a_token():
    assert cache_bytes(running(context=4096)) == 4096 * 128 * 1024
    assert cache_bytes(running(context=4096, batch=3)) == 3 * 4096 * 128 * 1024
    assert cache_bytes(running(context=3000)) == 4096 * 128 * 1024  # a power of two, for the graphs
    assert cache_bytes(running(context=3000, tp=2)) == 3000 * 64 * 1024  # ranks have no graphs
    assert cache_bytes(running(context=3000, batch=65)) == 65 * 3000 * 128 * 1024


@pytest.mark.parametrize("context", [1, 255, 256, 257, 4000, 4096, 4097])
def test_slots_are_those_of_the_graphs_cache(context):
    assert cache_slots(running(context=context), context) == _power_of_two(context)


def test_the_cache_is_the_one_that_generation_makes():
    cache = ContiguousCache(TINY, 3, 256, "cpu", torch.bfloat16)
    assert cache_bytes(running(TINY, batch=3, context=200)) == cache.k.nbytes + cache.v.nbytes


def test_key_value_heads_that_ranks_share_are_there_on_each():
    args = CUTTABLE.replace(n_kv_heads=2)
    assert cache_bytes(running(args, context=100, tp=4)) == 2 * 2 * 3 * 100 * 1 * 64
