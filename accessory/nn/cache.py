"""The key/value cache, handed to the network from outside (decision 8 of the architecture).

Legend: N new tokens of all sequences, P pages, H query heads, G key/value heads, d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.config import ModelArgs
from accessory.formats import page_bytes
from accessory.limits import PAGE_SIZE
from accessory.ops.paged_attention import PagedBatch, Pages, paged_attention, rotate_and_write


class PagedCache:
    """Pages of 64 tokens that any sequence may own: k and v of (layers, P, 64, G, d).

    Who owns which page is the engine's business. It announces each forward pass with `begin`. In the pass the tokens of
    all sequences are one row, (1, N), in the order of the batch.

    A pool of `fp8` numbers (e4m3) has an fp32 scale for each key and each value of a head: its largest number divided
    by 448. It takes about half the memory of 16 bits, and rounds to 4 significant bits. All queries see rounded keys
    and values, also those of the same step.
    """

    def __init__(
        self,
        args: ModelArgs,
        pages: int,
        device: torch.device | str,
        dtype: torch.dtype,
        kv_heads: int | None = None,
        fp8: bool = False,
    ) -> None:
        shape = (args.n_layers, pages, PAGE_SIZE, kv_heads or args.n_kv_heads, args.head_dim)
        stored = torch.float8_e4m3fn if fp8 else dtype
        # Empty: nothing reads a slot beyond a sequence's length, and a CPU's memory is taken only as pages are written.
        self.k, self.v = (torch.empty(shape, device=device, dtype=stored) for _ in range(2))
        self.fp8, pools = fp8, [self.k, self.v]
        if fp8:
            pools += [torch.empty(shape[:-1], device=device, dtype=torch.float32) for _ in range(2)]
        self._layers = [Pages(*layer) for layer in zip(*pools, strict=True)]

    def begin(self, batch: PagedBatch) -> None:
        """Announce a forward pass over the tokens of `batch`."""
        self._batch = batch

    def attend(self, layer: int, q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, rotation_N1c: Tensor) -> Tensor:
        """Rotate queries and keys, and write this layer's keys and values; gives the queries' attention, (N, H, d)."""
        pages, batch = self._layers[layer], self._batch
        q_NHd, k_NGd = rotate_and_write(pages, batch.slot_N, q_NHd, k_NGd, v_NGd, rotation_N1c)
        return paged_attention(q_NHd, pages, batch, (k_NGd, v_NGd))


def bytes_a_page(args: ModelArgs, kv_heads: int, dtype: torch.dtype, fp8: bool = False) -> int:
    """Bytes of a page of `PagedCache` in all layers."""
    return page_bytes(args.n_layers, kv_heads, args.head_dim, dtype.itemsize, fp8)
