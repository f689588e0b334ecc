"""The planner's key/value cache, against the one that the engine makes."""

import pytest
import torch
from helpers.plans import CUTTABLE, TINY, running

from accessory.engine.graphs import _power_of_two
from accessory.nn.cache import ContiguousCache
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
