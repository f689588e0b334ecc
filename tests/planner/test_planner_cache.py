"""The planner's key/value cache, against the one that the engine makes."""

import pytest
import torch
from helpers.plans import CUTTABLE, TINY, running

from accessory.nn.cache import PagedCache
from accessory.planner.cache import cache_bytes

PAGE = 64 * 128 * 1024  # of 8x7B: 128 KiB a token


def test_a_sequence_takes_whole_pages_and_one_is_for_padding():
    assert cache_bytes(running(context=4096)) == (64 + 1) * PAGE
    assert cache_bytes(running(context=4096, batch=3)) == (3 * 64 + 1) * PAGE
    assert cache_bytes(running(context=3000)) == (47 + 1) * PAGE
    assert cache_bytes(running(context=3000, batch=300)) == (300 * 47 + 1) * PAGE
    assert cache_bytes(running(context=3000, tp=2)) == (47 + 1) * PAGE // 2  # half of the heads


@pytest.mark.parametrize("context", [2, 64, 65, 200])
def test_the_cache_is_the_one_that_the_engine_makes(context):
    cache = PagedCache(TINY, 3 * -(-context // 64) + 1, "meta", torch.bfloat16)
    assert cache_bytes(running(TINY, batch=3, context=context)) == cache.k.nbytes + cache.v.nbytes


def test_key_value_heads_that_ranks_share_are_there_on_each():
    args = CUTTABLE.replace(n_kv_heads=2)
    assert cache_bytes(running(args, context=100, tp=4)) == 2 * 2 * 3 * (3 * 64) * 1 * args.head_dim
