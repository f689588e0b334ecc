"""Decoding steps replayed as CUDA graphs: one launch a token instead of hundreds, and no compiler.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.limits import GRAPH_LARGEST_BATCH, GRAPH_SMALLEST_EXTENT
from accessory.nn.cache import ContiguousCache
from accessory.nn.decoder import Decoder
from accessory.nn.experts import StackedExperts

# A graph has fixed shapes: keys are read up to a power of two, one graph each, captured when needed.


class DecodeGraphs:
    """The graphs of one decoder, and the cache they write to, kept from one generation to the next.

    Only for steps whose host need not know what the routers chose (`fits`).
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._cache: ContiguousCache | None = None
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @property
    def kept_bytes(self) -> int:
        """Of the cache that is kept: a later generation uses it again or gives it back first."""
        return 0 if self._cache is None else self._cache.k.nbytes + self._cache.v.nbytes

    def fits(self, batch: int) -> bool:
        experts = next(m for m in self.decoder.modules() if isinstance(m, StackedExperts))
        if not experts.w1.is_cuda or batch > GRAPH_LARGEST_BATCH:
            return False
        args = self.decoder.args
        with torch.no_grad():
            dtype = self.decoder.products_in
            x_TD = torch.empty(batch, args.dim, device=experts.w1.device, dtype=dtype)
            expert_TK = torch.empty(batch, args.moe.num_experts_per_tok, device="meta")
            return experts.host_free(x_TD, expert_TK)

    def cache(self, batch: int, slots: int) -> ContiguousCache:
        """A cache with room for `slots` tokens a sequence; the last one where it is large enough."""
        slots = _power_of_two(slots)
        if self._cache is None or len(self._cache.k[0]) != batch or self._cache.slots < slots:
            self._graphs.clear()
            self._cache = None  # give its memory back before asking for more
            device, dtype = self.decoder.tok_embeddings.weight.device, self.decoder.products_in
            self._cache = ContiguousCache(self.decoder.args, batch, slots, device, dtype, self.decoder.kv_heads)
            self._token_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self._position_B1 = torch.zeros_like(self._token_B1)
        return self._cache

    def step(self, token_B: Tensor, position_B: Tensor, extent: int) -> Tensor:
        """Logits (B, V) of one step, valid until the next; `extent` bounds position + 1."""
        assert self._cache is not None, "ask for the cache first"
        self._token_B1.copy_(token_B[:, None])
        self._position_B1.copy_(position_B[:, None])
        bucket = min(_power_of_two(extent), self._cache.slots)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._capture(bucket)
        graph, logits_BV = self._graphs[bucket]
        graph.replay()
        return logits_BV

    def _capture(self, extent: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Kernels are compiled and libraries started on first use, which a capture cannot hold. Running the step twice
        # is harmless: it writes the same keys to the same slots.
        device = self._token_B1.device
        # A capture records the current device of this thread, which need not be the decoder's.
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._run(extent)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # With a stream of our own: torch captures on one stream, on the card of the process's first capture.
            with torch.cuda.graph(graph, stream=side):
                logits_BV = self._run(extent)
        return graph, logits_BV

    def _run(self, extent: int) -> Tensor:
        assert self._cache is not None
        self._cache.begin(self._position_B1, extent=extent)
        return self.decoder(self._token_B1, self._position_B1, cache=self._cache).logits[:, 0]


def _power_of_two(n: int) -> int:
    return max(GRAPH_SMALLEST_EXTENT, 1 << (n - 1).bit_length())
