"""Token by token: a batch of prompts of any lengths in, one new token a sequence and step out.

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accessory.arguments import check_max_gen_len
from accessory.engine.graphs import DecodeGraphs
from accessory.engine.sampling import NO_TOKEN, Sampling, sample
from accessory.errors import InputError, NonFiniteError
from accessory.nn.cache import ContiguousCache
from accessory.nn.decoder import Decoder
from accessory.parallel.collectives import broadcast
from accessory.parallel.mesh import Ranks
from accessory.vision_config import IMAGE_ID

if TYPE_CHECKING:
    from accessory.nn.vision import Features

# Keys are read in steps of this many slots: a CPU does not pay for the whole context, and shapes change rarely.
EXTENT_STEP = 64

Choose = Callable[[Tensor], Tensor]


class Generation:
    """One batch being generated; iterate over it for the steps.

    Each step yields a list with a row's new token, or None where the row had ended: by a token of `stop_ids` (which is
    yielded as its last), by `max_gen_len`, or by a call of `finish(row)`. Rows do not depend on their neighbours.
    `images`: what was seen of the images that have places (`IMAGE_ID`) in the prompts, in their order.

    With `ranks`, all of them run the same generation; the first one samples and asks `cancelled` once a step, the
    others do as it says. When it is true, all rows end.

    Iterating raises NonFiniteError where the logits of a row that has not ended are not finite.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        max_gen_len: int,
        max_seq_len: int,
        sampling: Sampling | None = None,
        stop_ids: Collection[int] = (),
        vocab_size: int | None = None,
        graphs: DecodeGraphs | None = None,
        ranks: Ranks | None = None,
        cancelled: Callable[[], bool] | None = None,
        images: Features | None = None,
    ) -> None:
        check_lengths(prompts, max_gen_len, max_seq_len, decoder.args.vocab_size, images is not None)
        self.images = images
        self.decoder, self.prompts = decoder.fuse(), prompts
        self.max_gen_len, self.stop_ids = max_gen_len, frozenset(stop_ids)
        # Collectives stay out of graphs: one rank's end must not leave the others waiting inside a replay.
        self.ranks = ranks if ranks is not None and ranks.size > 1 else None
        self.graphs = graphs if graphs is not None and self.ranks is None and graphs.fits(len(prompts)) else None
        self.cancelled = cancelled or (lambda: False)
        sampling = sampling or Sampling()
        generator = sampling.generator()
        self._sample: Choose = lambda logits_BV: sample(logits_BV, sampling, generator, vocab_size)
        self.running = [True] * len(prompts)

    def finish(self, row: int) -> None:
        self.running[row] = False

    def __iter__(self) -> Iterator[list[int | None]]:
        # Not a decorator on the generator: between two steps the caller's own mode must hold.
        with torch.inference_mode():
            tokens_B, length_B, cache, longest = self._prefill()
        yield self._take(tokens_B)
        aligned = all(len(p) == longest for p in self.prompts)
        for step in range(1, self.max_gen_len):
            if not any(self.running):
                return
            with torch.inference_mode():
                if self.graphs is not None:
                    logits_BV = self.graphs.step(tokens_B, length_B, longest + step)
                else:
                    extent = longest + step if aligned else -(-(longest + step) // EXTENT_STEP) * EXTENT_STEP
                    cache.begin(length_B[:, None], extent=extent, aligned=aligned)
                    logits_BV = self.decoder(tokens_B[:, None], length_B[:, None], cache=cache).logits[:, 0]
                tokens_B = self._choose(logits_BV)
                length_B = length_B + 1
            yield self._take(tokens_B)

    def _prefill(self) -> tuple[Tensor, Tensor, ContiguousCache, int]:
        weight = self.decoder.tok_embeddings.weight
        lengths = [len(p) for p in self.prompts]
        longest = max(lengths)
        tokens_BT = torch.zeros(len(lengths), longest, dtype=torch.int64)
        for row, prompt in enumerate(self.prompts):
            tokens_BT[row, : len(prompt)] = torch.tensor(prompt)
        tokens_BT, length_B = tokens_BT.to(weight.device), torch.tensor(lengths, device=weight.device)
        args = self.decoder.args
        slots = longest + self.max_gen_len
        if self.graphs is not None:
            cache = self.graphs.cache(len(lengths), slots)
        else:
            kv_heads = self.decoder.kv_heads
            cache = ContiguousCache(args, len(lengths), slots, weight.device, self.decoder.products_in, kv_heads)
        positions_BT = torch.arange(longest, device=weight.device).expand_as(tokens_BT)
        cache.begin(positions_BT, fresh=True)
        logits_BV = self.decoder(tokens_BT, positions_BT, cache=cache, last_B=length_B - 1, images=self.images).logits
        return self._choose(logits_BV), length_B, cache, longest

    def _choose(self, logits_BV: Tensor) -> Tensor:
        """The next tokens, the same on every rank; all rows are finished when the first rank says so."""
        if self.ranks is None:
            stop, tokens_B = self.cancelled(), self._sample(logits_BV)
        else:
            said_C = torch.zeros(len(logits_BV) + 1, dtype=torch.int64, device=logits_BV.device)
            if self.ranks.rank == 0:
                said_C[:-1], said_C[-1] = self._sample(logits_BV), self.cancelled()
            broadcast(said_C, self.ranks)
            stop, tokens_B = bool(said_C[-1]), said_C[:-1]
        if stop:
            self.running = [False] * len(self.running)
        return tokens_B

    def _take(self, tokens_B: Tensor) -> list[int | None]:
        step: list[int | None] = []
        tokens = tokens_B.tolist()
        for row, token in enumerate(tokens):
            if token == NO_TOKEN and self.running[row]:
                raise NonFiniteError(f"prompts[{row}]: {describe_nonfinite(self.decoder)}")
            step.append(token if self.running[row] else None)
            if token in self.stop_ids:
                self.running[row] = False
        if NO_TOKEN in tokens:  # of a row that has ended; the embedding takes no such id
            with torch.inference_mode():
                tokens_B.clamp_(min=0)
        return step


def describe_nonfinite(decoder: Decoder) -> str:
    """Why the logits of a network may not be finite, for a message."""
    if decoder.products_in == torch.float16:
        return "the logits are not finite; fp16 overflows where bf16 does not, so load the model with dtype bf16"
    return "the logits are not finite, so its weights are broken; `accessory verify` may say which"


def check_lengths(
    prompts: Sequence[Sequence[int]], max_gen_len: int, max_seq_len: int, vocab_size: int, images: bool = False
) -> None:
    """Raise InputError for what no cache and no network could take."""
    check_max_gen_len(max_gen_len, max_seq_len)
    if not prompts:
        raise InputError("prompts: got an empty list, but at least one prompt is needed")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompts[{row}]: has no tokens; a prompt needs at least one")
        if len(prompt) + max_gen_len > max_seq_len:
            raise InputError(
                f"prompts[{row}]: {len(prompt)} tokens and max_gen_len = {max_gen_len} "
                f"do not fit max_seq_len = {max_seq_len}"
            )
        if not (IMAGE_ID if images else 0) <= min(prompt) <= max(prompt) < vocab_size:
            raise InputError(f"prompts[{row}]: token ids must lie in 0 … {vocab_size - 1} (vocab_size = {vocab_size})")
