"""The planner's key/value cache, against the one that the engine makes."""

import pytest
import torch
from helpers.plans import BOTH, CUTTABLE, TINY, running

from accessory.adapt.peft import adapter_specs_for, add_adapters
from accessory.adapt.quant import quantize_skeleton
from accessory.engine.graphs import DecodeGraphs, _power_of_two
from accessory.formats import FORMATS
from accessory.nn.cache import ContiguousCache
from accessory.nn.decoder import Decoder
from accessory.nn.linear import PackedWeight
from accessory.ops import dispatch, linear
from accessory.planner.cache import cache_bytes, cache_slots


def test_the_cache_takes_128_kib_a_token():
    assert cache_bytes(running(context=4096)) == 4096 * 128 * 1024
    assert cache_bytes(running(context=4096, batch=3)) == 3 * 4096 * 128 * 1024
    assert cache_bytes(running(context=3000)) == 4096 * 128 * 1024  # a power of two, for the graphs
    assert cache_bytes(running(context=3000, tp=2)) == 3000 * 64 * 1024  # several ranks have no graphs
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


# --------------------------------------------------------------------------- where the engine has graphs

ADAPTERS = {
    "none": {},
    "LoRA": {"lora_rank": 16},
    "LoRA of a rank without a grouped product": {"lora_rank": 4},
    "LoRA of attention": {"lora_rank": 4, "lora_targets": ("wq", "wv")},
    "LoRA of w2": {"lora_rank": 8, "lora_targets": ("w2",)},
    "biases": {"bias_tuning": True},
}


@pytest.fixture
def meta_is_an_h100(monkeypatch):
    """The engine takes the meta device for a card of compute capability 9.0 with Triton."""

    def product(*args, **options):
        found = dispatch_product(*args, **options)
        return found._replace(device="cuda", capability=(9, 0), triton=True)

    dispatch_product = dispatch.product
    for module in (dispatch, linear):
        monkeypatch.setattr(module, "product", product)
    for kind in (torch.Tensor, PackedWeight):
        monkeypatch.setattr(kind, "is_cuda", property(lambda weight: weight.device.type == "meta"))


@pytest.mark.parametrize("quant", [None, *FORMATS])
@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_slots_are_those_that_the_engine_takes(adapters, implementation, quant, meta_is_an_h100):
    args = CUTTABLE.replace(n_layers=1, **ADAPTERS[adapters])
    with torch.device("meta"):
        decoder = Decoder(args, implementation)
        add_adapters(decoder, adapter_specs_for(args))
    decoder.cast(torch.bfloat16).compute_in(torch.bfloat16)
    setups = [running(args, quant, implementation=implementation, batch=batch) for batch in range(1, 71)]
    if setups[0].quantized:
        quantize_skeleton(decoder, setups[0].quant)
    graphs = DecodeGraphs(decoder)
    taken = {s.task.batch: _power_of_two(2100) if graphs.fits(s.task.batch) else 2100 for s in setups}
    assert {s.task.batch: cache_slots(s, 2100) for s in setups} == taken


@pytest.mark.parametrize("quant", [None, *FORMATS])
@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_every_network_has_graphs_up_to_the_largest_batch(adapters, implementation, quant):
    """No host loops over experts, whatever stands beside their weights."""
    args = running().args.replace(**ADAPTERS[adapters])
    for batch, slots in ((1, 4096), (7, 4096), (64, 4096), (65, 2100)):
        assert cache_slots(running(args, quant, implementation=implementation, batch=batch), 2100) == slots
