"""Scoring: the logits of given texts, and their likelihood under a model. `MetaModel` passes such calls to `Scorer`.

Legend: B examples of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accessory.data.image_tokens import insert_image_tokens, remove_tags
from accessory.data.tokenizer import Tokenizer
from accessory.engine.scheduler import NOT_FINITE
from accessory.errors import InputError, NonFiniteError
from accessory.model.prompts import Pixels, Prompt, count_prompts, image_token_counts, open_images

if TYPE_CHECKING:
    from accessory.model.image_processor import ImageProcessor, Images


@dataclass(frozen=True)
class Scorer:
    """Scores examples. The methods have the docstrings of `TextModel`'s methods.

    score: gives the logits after each token of rows of ids, some with an image (`engine.Engine.score`).
    """

    score: Callable[[list[list[int]], list[Any]], list[Tensor]]
    tokenizer: Tokenizer
    vocab_size: int
    max_seq_len: int
    image_processor: ImageProcessor | None

    def compute_logits(self, examples: Sequence[Prompt], images: Images, bos: bool, eos: bool) -> list[Tensor]:
        count_prompts(examples)
        examples, pixels = open_images(self.image_processor, examples, images, "example")
        return self._logits(self._rows(examples, pixels, bos, eos), pixels)

    def evaluate_examples(
        self,
        examples: Sequence[Prompt],
        contexts: Sequence[Prompt] | None,
        images: Images,
        bos: bool,
        eos: bool,
    ) -> dict[str, list]:
        count_prompts(examples)
        if contexts is not None and len(contexts) != len(examples):
            raise InputError(f"contexts: got {len(contexts)} for {len(examples)} examples; give one each")
        examples, pixels = open_images(self.image_processor, examples, images, "example")
        if contexts is not None and self.image_processor is not None:
            contexts = remove_tags(contexts, pixels)
        rows = self._rows(examples, pixels, bos, eos)
        starts = [
            self._context_length(contexts[n], example, rows[n], n, bos) if contexts is not None else 1
            for n, example in enumerate(examples)
        ]
        for n, (ids, start) in enumerate(zip(rows, starts, strict=True)):
            if start >= len(ids):
                raise InputError(f"examples[{n}]: nothing follows its context, so there is nothing to judge")
        result: dict[str, list] = {"log_likelihood": [], "ppl": [], "max_equal": [], "non_context_logits": []}
        for n, (ids, start, logits_TV) in enumerate(zip(rows, starts, self._logits(rows, pixels), strict=True)):
            judged_TV, label_T = logits_TV[start - 1 : -1], torch.tensor(ids[start:], device=logits_TV.device)
            log_p_T = judged_TV.log_softmax(-1).gather(1, label_T[:, None]).squeeze(1)
            likelihood = log_p_T.sum().item()
            if not math.isfinite(likelihood):
                raise NonFiniteError(f"examples[{n}]: {NOT_FINITE}")
            result["log_likelihood"].append(likelihood)
            result["ppl"].append(log_p_T.mean().neg().exp().item())
            result["max_equal"].append(bool((judged_TV.argmax(-1) == label_T).all()))
            result["non_context_logits"].append(judged_TV)
        return result

    def _logits(self, rows: Sequence[list[int]], pixels: Pixels) -> list[Tensor]:
        """The logits (T, V) fp32 after each token of each row of T token ids, without those of image tokens."""
        counts = image_token_counts(self.image_processor, pixels)
        with_image = [
            insert_image_tokens(ids, count, self.tokenizer.bos_id) for ids, count in zip(rows, counts, strict=True)
        ]
        logits = self.score(with_image, [None if p is None else p.numpy() for p in pixels])
        # The image comes after BOS, so the logits after BOS are those of the last image token. The first `count`
        # logits are dropped.
        return [logits_TV[count:] for logits_TV, count in zip(logits, counts, strict=True)]

    def _rows(self, examples: Sequence[Prompt], pixels: Pixels, bos: bool, eos: bool) -> list[list[int]]:
        """The checked token ids of each example, without image tokens. Those must fit into `max_seq_len` too."""
        counts = image_token_counts(self.image_processor, pixels)
        return [self._example_ids(e, n, bos, eos, counts[n]) for n, e in enumerate(examples)]

    def _example_ids(self, example: Prompt, row: int, bos: bool, eos: bool, image_tokens: int) -> list[int]:
        ids = self._encode(example, bos, eos)
        if not ids:
            raise InputError(f"examples[{row}]: has no tokens")
        if len(ids) + image_tokens > self.max_seq_len:
            image = f" and an image of {image_tokens} positions" if image_tokens else ""
            raise InputError(f"examples[{row}]: {len(ids)} tokens{image}, but max_seq_len is {self.max_seq_len}")
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise InputError(f"examples[{row}]: token ids must lie in 0 … {self.vocab_size - 1}")
        return ids

    def _encode(self, text: Prompt, bos: bool, eos: bool) -> list[int]:
        return self.tokenizer.encode(text, bos=bos, eos=eos, special=True) if isinstance(text, str) else list(text)

    def _context_length(self, context: Prompt, example: Prompt, ids: list[int], row: int, bos: bool) -> int:
        """The number of the example's tokens that are context; at least one, because nothing predicts the first."""
        both_text = isinstance(context, str) and isinstance(example, str)
        begins = example.startswith(context) if both_text else None  # type: ignore[union-attr, arg-type]
        context_ids = self._encode(context, bos, eos=False)
        shared = next((n for n, (a, b) in enumerate(zip(context_ids, ids, strict=False)) if a != b), len(context_ids))
        # One token may contain the end of the context and the beginning of the rest. It is scored.
        if begins is False or (begins is None and shared < len(context_ids)):
            raise InputError(f"contexts[{row}]: examples[{row}] does not begin with it")
        return max(1, min(shared, len(ids)))
