"""Steps replayed as CUDA graphs (`ops.graphs`): those that decode, and those with few tokens of prompts.

The host takes longer to launch a network's kernels than a card to compute a few hundred tokens. A graph is one launch.
It has room for a fixed number of sequences and tokens, and padding takes what a step leaves. Collectives between ranks
are inside; all ranks replay the same graph.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from accessory.engine.step_input import Size, StepInput, padded
from accessory.limits import GRAPH_BUCKETS, GRAPH_DECODES, GRAPH_MOST_TOKENS, GRAPH_PROMPTS, GRAPH_TOKENS
from accessory.ops.graphs import Graphs, possible


class StepGraphs:
    """The graphs of one network, captured when first needed.

    forward: computes logits (B, V) from a step's numbers (`StepInput.flat`) on the device. host_free: whether so many
    tokens run without the host. Both are told whether a token takes one of several adapters: such steps have graphs of
    their own, so that others do not pay for adapters. pages: of a sequence, at most. most: sequences that run at once.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Size, bool], Tensor],
        host_free: Callable[[int, bool], bool],
        pages: int,
        device: torch.device,
        most: int,
    ) -> None:
        self._forward, self._host_free = forward, host_free
        self.enabled = possible(device)
        self.sizes = sizes_of(pages, most)
        self._fit: dict[tuple[int, bool], bool] = {}
        self._graphs: Graphs[Tensor] = Graphs(device)

    def size(self, here: Size, adapted: bool) -> Size | None:
        """The size of the graph for a step of size `here`; None where such a step needs the host."""
        if not self.enabled:
            return None
        size = next((size for size in self.sizes if size.holds(here)), None)
        return size if size is not None and self.fits(size.all_tokens, adapted) else None

    def fits(self, tokens: int, adapted: bool) -> bool:
        """Whether so many tokens run without the host."""
        if (tokens, adapted) not in self._fit:
            self._fit[tokens, adapted] = self._host_free(tokens, adapted)
        return self._fit[tokens, adapted]

    def step(self, size: Size, step: StepInput, here: Size, adapted: bool) -> Tensor:
        """Logits (B, V) of a step of size `here`, by the graph of `size`; valid until the next one.

        They are those of the sequences that decode, padding too, then of the prompts.
        """
        flat = torch.from_numpy(padded(step, here, size))
        return self._graphs.run((size, adapted), lambda flat: self._forward(flat, size, adapted), flat)

    def again(self, size: Size, adapted: bool) -> Callable[[], None] | None:
        """Replays the last step of this size, for measurements; None where there was none."""
        return self._graphs.again((size, adapted))


def sizes_of(pages: int, most: int) -> list[Size]:
    """Of all graphs, the fewest tokens first. pages, most: as of `StepGraphs`."""
    decoding = [Size(decodes, 0, 0, 0, pages) for decodes in (*(b for b in GRAPH_BUCKETS if b < most), most)]
    prompts = GRAPH_PROMPTS + 1  # the last one is padding
    with_prompts = [
        Size(decodes, tokens, prompts, decodes + prompts, pages)
        for decodes in (*(b for b in GRAPH_DECODES if b < most), most)
        for tokens in GRAPH_TOKENS
        if decodes + tokens <= GRAPH_MOST_TOKENS
    ]
    return sorted(decoding + with_prompts, key=lambda size: size.all_tokens)
