"""The key/value cache: how many bytes its pages take."""

from __future__ import annotations

from accessory.formats import page_bytes
from accessory.limits import PAGE_SIZE
from accessory.planner.setup import Inference, Setup


def cache_bytes(setup: Setup) -> int:
    """Pages for all sequences at their longest, and the page that padding writes to, in all layers of one rank.

    Graphs of decoding steps change nothing, and every rank has as many pages.
    """
    assert isinstance(setup.task, Inference)
    pages = setup.task.batch * -(-setup.task.context // PAGE_SIZE) + 1
    return pages * page_bytes(setup.args.n_layers, setup.kv_heads, setup.args.head_dim, setup.dense_bytes)
