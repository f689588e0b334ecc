"""The key/value cache: how many bytes its pages take."""

from __future__ import annotations

from accessory.errors import InputError
from accessory.formats import page_bytes
from accessory.limits import PAGE_SIZE
from accessory.planner.setup import Inference, Setup


def cache_bytes(setup: Setup) -> int:
    """Pages for all sequences at their longest, and the page that padding writes to, in all layers of one rank.

    Graphs of decoding steps change nothing, and every rank has as many pages.
    """
    assert isinstance(setup.task, Inference)
    return (setup.task.batch * -(-setup.task.context // PAGE_SIZE) + 1) * bytes_a_page(setup)


def bytes_a_page(setup: Setup) -> int:
    """Bytes of a page in all layers of one rank."""
    assert isinstance(setup.task, Inference)
    args, fp8 = setup.args, setup.task.cache_dtype == "fp8"
    return page_bytes(args.n_layers, setup.kv_heads, args.head_dim, setup.dense_bytes, fp8)


def pages_in(cache_gb: float, page: int) -> int:
    """The pages of `page` bytes that a cache of `cache_gb` has. InputError where it has none beside that of padding."""
    pages = int(cache_gb * 1e9 // page)
    if pages < 2:
        raise InputError(
            f"cache_gb: got {cache_gb:g}, but a page of {PAGE_SIZE} tokens takes {page / 1e9:.3g} GB on a rank, and a "
            f"cache has at least two; give at least {2 * page / 1e9:.3g}"
        )
    return pages
