"""The key/value cache, handed to the network from outside (decision 8 of the architecture).

Legend: B sequences, T new tokens, S slots, N new tokens of all sequences, P pages, H query heads, G key/value heads,
d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.config import ModelArgs
from accessory.formats import page_bytes
from accessory.limits import PAGE_SIZE
from accessory.ops.paged_attention import PagedBatch, Pages, paged_attention, write_pages


class ContiguousCache:
    """One slot a position, the same number for every sequence: k and v of (layers, B, S, G, d).

    A forward pass announces its positions with `begin`; each layer then writes its keys and values and reads all it may
    look at. Rows may stand at different positions. A slot is seen only by queries at its position or later, and it is
    written before any such query exists, so right-padded prompts need no mask of their own: what padding left in a slot
    is overwritten by the token that truly takes that position.
    """

    def __init__(
        self,
        args: ModelArgs,
        batch: int,
        slots: int,
        device: torch.device | str,
        dtype: torch.dtype,
        kv_heads: int | None = None,
    ) -> None:
        shape = (args.n_layers, batch, slots, kv_heads or args.n_kv_heads, args.head_dim)
        # Zeros, not empty: a masked NaN of uninitialised memory would still poison the sum.
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.slots = slots
        # Views made once: a decoding step would otherwise make them anew in every layer.
        self._layers = [(k, v, k.flatten(0, 1), v.flatten(0, 1)) for k, v in zip(self.k, self.v, strict=True)]
        self._first_row_B1 = (torch.arange(batch, device=device) * slots)[:, None]
        self._slot_S = torch.arange(slots, device=device)

    def begin(
        self, positions_BT: Tensor, *, fresh: bool = False, extent: int | None = None, aligned: bool = False
    ) -> None:
        """Announce a forward pass over `positions_BT`.

        fresh: rows start at position 0 and nothing earlier exists, so attention is causal among the new tokens alone.
        extent: an upper bound of position + 1, when the caller knows one; fewer slots are then read.
        aligned: each row brings one token, at position extent - 1, so every slot read may be seen and no mask is made.
        """
        self._row_N = (positions_BT + self._first_row_B1).flatten()
        self._fresh = fresh
        self._extent = self.slots if extent is None else min(extent, self.slots)
        self.mask_BTS = None if fresh or aligned else self._slot_S[: self._extent] <= positions_BT[..., None]

    def update(self, layer: int, k_BTGd: Tensor, v_BTGd: Tensor) -> tuple[Tensor, Tensor]:
        """Write this layer's new keys and values; return those to attend to, (B, S', G, d)."""
        k_BSGd, v_BSGd, k_NGd, v_NGd = self._layers[layer]
        k_NGd.index_copy_(0, self._row_N, k_BTGd.flatten(0, 1))
        v_NGd.index_copy_(0, self._row_N, v_BTGd.flatten(0, 1))
        if self._fresh:
            return k_BTGd, v_BTGd
        return k_BSGd[:, : self._extent], v_BSGd[:, : self._extent]


class PagedCache:
    """Pages of 64 tokens that any sequence may own: k and v of (layers, P, 64, G, d).

    Who owns which page is the engine's business. It announces each forward pass with `begin`. In the pass the tokens of
    all sequences are one row, (1, N), in the order of the batch. A pool of `fp8` numbers has a scale for each token and
    head, takes about half the memory of 16 bits, and rounds keys and values to 4 significant bits.
    """

    mask_BTS = None  # attention needs none: the batch says what each query sees

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
        pools = [self.k, self.v]
        if fp8:
            pools += [torch.empty(shape[:-1], device=device, dtype=torch.float32) for _ in range(2)]
        self._layers = [Pages(*layer) for layer in zip(*pools, strict=True)]

    def begin(self, batch: PagedBatch) -> None:
        """Announce a forward pass over the tokens of `batch`."""
        self._batch = batch

    def attend(self, layer: int, q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor) -> Tensor:
        """Write this layer's new keys and values; return the attention of the queries, (N, H, d)."""
        pages, batch = self._layers[layer], self._batch
        write_pages(pages, batch.slot_N, k_NGd, v_NGd)
        return paged_attention(q_NHd, pages, batch, (k_NGd, v_NGd))


def bytes_a_page(args: ModelArgs, kv_heads: int, dtype: torch.dtype, fp8: bool = False) -> int:
    """Bytes of a page of `PagedCache` in all layers."""
    return page_bytes(args.n_layers, kv_heads, args.head_dim, dtype.itemsize, fp8)
