"""A token for each row of a batch, drawn as if the row were alone.

A draw depends on the row's logits, parameters and earlier tokens. Random numbers come from a counter (`philox`), and
sums are exact (`draw`), so neither the other rows nor the device change it.

The order of operations is transformers': bias, penalties, mask, temperature, top-k, top-p, min-p. vLLM puts min-p
before top-k. transformers' top-k keeps all tokens that tie with the last one; here k tokens are k.

Nothing waits for the device: numbers go there from pinned memory.

Legend: B rows of a call, R some of them, S slots, V the tokenizer's ids, K a row's best ids, F numbers, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from accessory.engine import philox
from accessory.engine.draw import MOST_BY_TOP_K, best, draw
from accessory.engine.sampling_params import SamplingParams
from accessory.ops.transfer import to_device

# The columns of a slot's numbers: first those of a draw, then the penalties.
_DRAWING = ("temperature", "top_k", "top_p", "min_p")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_PROMPT_ROWS = 256  # rows of a prompt whose log-probabilities are computed at a time

Mask = Tensor | NDArray[np.uint8] | bytes


@dataclass(frozen=True)
class Drawn:
    """The tokens of a call, int64 on the device: -1 for a row whose logits hold NaN or +inf, or have nothing to draw.

    Log-probabilities are the log_softmax of the raw logits in fp32, before penalties and temperature, as vLLM's are.
    They are None if no row asks. K is the largest number that a row asks for; a row's first n are its n best.
    """

    token_B: Tensor
    logprob_B: Tensor | None = None
    top_ids_BK: Tensor | None = None
    top_logprobs_BK: Tensor | None = None


class Sampler:
    """Draws for sequences, each of which has a slot. Logits may be wider than `vocab_size`; those ids are not drawn."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device | str) -> None:
        self.slots, self.vocab_size, self.device = slots, vocab_size, torch.device(device)
        self._drawing_SF, self._penalties_SF = np.zeros((slots, len(_DRAWING))), np.zeros((slots, len(_PENALTIES)))
        self._seed_S, self._copy_S = np.zeros(slots, np.uint64), np.zeros(slots, np.uint64)
        self._counts_S = np.zeros(slots, bool)
        self._min_tokens_S, self._logprobs_S = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self._bias_S: list[Mapping[int, float]] = [{}] * slots
        self._no_stop_S: list[Mapping[int, float]] = [{}] * slots
        # How often a token is in the answer, and whether it is in the prompt: made when a slot first has a penalty.
        self._answer_SV: Tensor | None = None
        self._prompt_SV: Tensor | None = None

    @torch.inference_mode()
    def start(
        self,
        slot: int,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        answer_ids: Sequence[int] = (),
        stop_ids: Collection[int] = (),
    ) -> None:
        """A sequence takes the slot. It drew `answer_ids` before it was put back. `min_tokens` holds off `stop_ids`."""
        assert params.seed is not None or params.temperature == 0, "draws need a seed: SamplingParams.with_seed"
        params.check_vocabulary(self.vocab_size)
        top_k = min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size
        self._drawing_SF[slot] = params.temperature, top_k, params.top_p, params.min_p
        self._penalties_SF[slot] = [getattr(params, name) for name in _PENALTIES]
        self._seed_S[slot], self._copy_S[slot] = params.seed or 0, params.copy
        self._logprobs_S[slot] = -1 if params.logprobs is None else min(params.logprobs, self.vocab_size)
        self._bias_S[slot] = params.logit_bias or {}
        self._no_stop_S[slot] = {token: -np.inf for token in stop_ids if 0 <= token < self.vocab_size}
        self._min_tokens_S[slot] = params.min_tokens if self._no_stop_S[slot] else 0
        self._counts_S[slot] = params.counts_tokens
        if params.counts_tokens:
            if self._answer_SV is None or self._prompt_SV is None:
                shape = self.slots, self.vocab_size
                self._answer_SV = torch.zeros(shape, dtype=torch.int32, device=self.device)
                self._prompt_SV = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self._answer_SV[slot] = self._send(self._histogram(answer_ids))
            self._prompt_SV[slot] = self._send(self._histogram(prompt_ids) > 0)

    @torch.inference_mode()
    def __call__(
        self, logits_BV: Tensor, slots: Sequence[int], positions: Sequence[int], masks: Mapping[int, Mask] | None = None
    ) -> Drawn:
        """A token for each row i, of the sequence in `slots[i]`, whose answer has `positions[i]` tokens before it.

        `masks` says which tokens a row may take: V booleans on the host, or their bits as numpy.packbits writes them.
        """
        assert logits_BV.shape[1] >= self.vocab_size
        slot_B, position_B = np.asarray(slots), np.asarray(positions)
        raw_BV = logits_BV[:, : self.vocab_size]
        x_BV = self._changed(raw_BV, slot_B, position_B, masks or {})
        top_B, token_B = x_BV.max(-1)  # torch promises the first of equal ones; a NaN is larger than all
        usable_B = top_B.isfinite()
        if x_BV is not raw_BV:  # what is not finite may have been masked
            usable_B &= raw_BV.max(-1).values.isfinite()
        for chosen_R, k in self._groups(slot_B):
            slot_R = slot_B[chosen_R]
            uniform_R = philox.uniform(self._seed_S[slot_R], self._copy_S[slot_R], position_B[chosen_R])
            numbers_RF = self._send(np.column_stack([chosen_R, uniform_R, self._drawing_SF[slot_R]]))
            row_R = numbers_RF[:, 0].long()
            x_RV = torch.where(usable_B[row_R, None], x_BV[row_R].float(), 0.0)
            token_B.index_copy_(0, row_R, draw(x_RV, numbers_RF[:, 1:], k))
        token_B = torch.where(usable_B, token_B, -1)
        self._count(token_B, slot_B)
        n = int(self._logprobs_S[slot_B].max(initial=-1))
        return Drawn(token_B) if n < 0 else Drawn(token_B, *self._logprobs(raw_BV, token_B, n))

    @torch.inference_mode()
    def prompt_logprobs(self, logits_TV: Tensor, ids_T: Tensor, n: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities (T,) of given ids, and the n best ids with theirs, (T, n). Row i is about `ids_T[i]`."""
        pieces = zip(logits_TV[:, : self.vocab_size].split(_PROMPT_ROWS), ids_T.split(_PROMPT_ROWS), strict=True)
        chosen, top_ids, top = zip(*(self._logprobs(x, ids, min(n, self.vocab_size)) for x, ids in pieces), strict=True)
        return torch.cat(chosen), torch.cat(top_ids) if n else None, torch.cat(top) if n else None

    def _logprobs(self, raw_TV: Tensor, ids_T: Tensor, n: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x_TV = raw_TV.float()
        # A GPU sums a row in an order that depends on where in 16 bytes the row begins.
        if x_TV.is_cuda and self.vocab_size % 4:
            x_TV = F.pad(x_TV, (0, -self.vocab_size % 4), value=-torch.inf)
        logprob_TV = x_TV.log_softmax(-1)[:, : self.vocab_size]
        chosen_T = logprob_TV.gather(1, ids_T.clamp(0, self.vocab_size - 1)[:, None]).squeeze(1)
        top_TK, top_ids_TK = best(logprob_TV, n) if n else (None, None)
        return chosen_T, top_ids_TK, top_TK

    def _changed(self, raw_BV: Tensor, slot_B: NDArray, position_B: NDArray, masks: Mapping[int, Mask]) -> Tensor:
        """The logits after bias, penalties and mask, in fp32; `raw_BV` itself if no row has any of them."""
        added = [(row, self._bias_S[slot]) for row, slot in enumerate(slot_B) if self._bias_S[slot]]
        early_R = np.flatnonzero(position_B < self._min_tokens_S[slot_B])
        added += [(row, self._no_stop_S[slot_B[row]]) for row in early_R]
        counted_R = np.flatnonzero(self._counts_S[slot_B])
        if not (added or counted_R.size or masks):
            return raw_BV
        x_BV = raw_BV.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if added:
            place = np.array([row * self.vocab_size + token for row, bias in added for token in bias])
            value = np.array([value for _, bias in added for value in bias.values()], np.float32)
            x_BV.view(-1).index_add_(0, self._send(place), self._send(value))
        if counted_R.size:
            self._penalise(x_BV, counted_R, slot_B[counted_R])
        if masks:
            packed = [np.packbits(m) if isinstance(m, Tensor) else np.frombuffer(m, np.uint8) for m in masks.values()]
            row_R, bits_RV = self._send(np.array(list(masks))), self._send(np.stack(packed))
            shift_8 = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.device)
            refused_RV = ((bits_RV[:, :, None] >> shift_8) & 1).flatten(1)[:, : self.vocab_size] == 0
            x_BV.index_copy_(0, row_R, x_BV[row_R].masked_fill(refused_RV, -torch.inf))
        return x_BV

    def _penalise(self, x_BV: Tensor, chosen_R: NDArray, slot_R: NDArray) -> None:
        assert self._answer_SV is not None
        assert self._prompt_SV is not None
        numbers_RF = self._send(np.column_stack([chosen_R, slot_R, self._penalties_SF[slot_R]]))
        row_R, at_R = numbers_RF[:, :2].long().unbind(1)
        repetition_R1, presence_R1, frequency_R1 = numbers_RF[:, 2:].float().split(1, dim=1)
        x_RV, times_RV, in_prompt_RV = x_BV[row_R], self._answer_SV[at_R], self._prompt_SV[at_R]
        in_answer_RV = times_RV > 0
        repeated_RV = torch.where(x_RV > 0, x_RV / repetition_R1, x_RV * repetition_R1)
        x_RV = torch.where(in_prompt_RV | in_answer_RV, repeated_RV, x_RV)
        x_BV.index_copy_(0, row_R, x_RV - frequency_R1 * times_RV - presence_R1 * in_answer_RV)

    def _count(self, token_B: Tensor, slot_B: NDArray) -> None:
        """Count the drawn tokens of slots with penalties."""
        counted_R = np.flatnonzero(self._counts_S[slot_B])
        if counted_R.size:
            assert self._answer_SV is not None
            row_R, first_R = self._send(np.stack([counted_R, slot_B[counted_R] * self.vocab_size])).unbind(0)
            drawn_R = token_B[row_R]
            self._answer_SV.view(-1).index_add_(0, first_R + drawn_R.clamp(min=0), (drawn_R >= 0).int())

    def _groups(self, slot_B: NDArray) -> Iterator[tuple[NDArray, int]]:
        """Rows that `draw` can take together, and their `k`. A row's own parameters decide its group."""
        temperature_B, top_k_B, top_p_B, _ = self._drawing_SF[slot_B].T
        unranked_B = (top_k_B >= self.vocab_size) & (top_p_B >= 1)
        few_B = ~unranked_B & (top_k_B <= MOST_BY_TOP_K)
        for kind_B in (unranked_B, few_B, ~unranked_B & ~few_B):
            chosen_R = np.flatnonzero(kind_B & (temperature_B > 0))
            if chosen_R.size:
                yield chosen_R, 0 if kind_B is unranked_B else int(top_k_B[chosen_R].max())

    def _histogram(self, ids: Sequence[int]) -> NDArray[np.int32]:
        """How often each id occurs, int32 (V,). Placeholders outside the vocabulary do not count."""
        known = np.array([i for i in ids if 0 <= i < self.vocab_size], np.int64)
        return np.bincount(known, minlength=self.vocab_size).astype(np.int32)

    def _send(self, array: NDArray) -> Tensor:
        return to_device(torch.from_numpy(array), self.device)
