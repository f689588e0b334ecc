"""The planner's key/value cache, against the one that the engine makes."""

import pytest
import torch
from helpers.plans import CUTTABLE, TINY, running

from accessory.errors import InputError
from accessory.nn.cache import PagedCache
from accessory.planner.cache import cache_bytes, pages_in

PAGE = 64 * 128 * 1024  # of 8x7B: 128 KiB a token


def test_a_sequence_takes_whole_pages_and_one_is_for_padding():
    assert cache_bytes(running(context=4096)) == (64 + 1) * PAGE
    assert cache_bytes(running(context=4096, batch=3)) == (3 * 64 + 1) * PAGE
    assert cache_bytes(running(context=3000)) == (47 + 1) * PAGE
    assert cache_bytes(running(context=3000, batch=300)) == (300 * 47 + 1) * PAGE
    assert cache_bytes(running(context=3000, tp=2)) == (47 + 1) * PAGE // 2  # half of the heads


@pytest.mark.parametrize("context", [2, 64, 65, 200])
@pytest.mark.parametrize("dtype", [None, "fp8"])
def test_the_cache_is_the_one_that_the_engine_makes(context, dtype):
    cache = PagedCache(TINY, 3 * -(-context // 64) + 1, "meta", torch.bfloat16, fp8=dtype == "fp8")
    scales = [t for layer in cache._layers for t in (layer.k_scale_PSG, layer.v_scale_PSG) if t is not None]
    held = sum(tensor.nbytes for tensor in (cache.k, cache.v, *scales))
    assert cache_bytes(running(TINY, batch=3, context=context, cache_dtype=dtype)) == held


def test_fp8_takes_a_byte_a_number_and_a_scale_a_vector():
    assert cache_bytes(running(context=4096, cache_dtype="fp8")) == (64 + 1) * PAGE * (128 + 4) // 256


def test_a_cache_of_a_given_size_has_whole_pages():
    assert pages_in(65.9 * PAGE / 1e9, PAGE) == 65
    with pytest.raises(InputError, match=r"^cache_gb: got 0\.01, but a page of 64 tokens takes 0\.00839 GB.*0\.0168$"):
        pages_in(0.01, PAGE)


def test_key_value_heads_that_ranks_share_are_there_on_each():
    args = CUTTABLE.replace(n_kv_heads=2)
    assert cache_bytes(running(args, context=100, tp=4)) == 2 * 2 * 3 * (3 * 64) * 1 * args.head_dim
