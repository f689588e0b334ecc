"""Requests of text made into requests to the engine: prompts encoded and cut, images opened, adapters found."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from operator import index
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accessory.arguments import check_max_gen_len, check_stops
from accessory.data.image_tokens import insert_image_tokens
from accessory.data.tokenizer import Tokenizer
from accessory.engine.sequence import ImageSpan
from accessory.engine.sequence import Sequence as Request
from accessory.errors import InputError
from accessory.model.prompts import Prompt, image_token_counts, open_prompt
from accessory.model.writing import TextRequest, Writing
from accessory.vision_config import IMAGE_ID

if TYPE_CHECKING:
    from accessory.model.image_processor import ImageProcessor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RequestMaker:
    """Makes requests to one model. adapters: the name and the digest of each, in the order of their numbers."""

    tokenizer: Tokenizer
    vocab_size: int
    max_seq_len: int
    image_processor: ImageProcessor | None
    adapters: Sequence[tuple[str, bytes]]

    def open(self, asked: TextRequest) -> Writing:
        """As `make`, of a request whose image is not open."""
        prompt, pixels = open_prompt(self.image_processor, asked.prompt, asked.image, asked.name)
        return self.make(replace(asked, prompt=prompt), pixels)

    def make(self, asked: TextRequest, image: Tensor | None) -> Writing:
        """What is asked, as a request to the engine. image: the pixels of its image, which is open.

        Raises InputError for what cannot be answered.
        """
        number, root = self._adapter(asked.adapter)
        check_stops(asked.stops)
        asked.params.check_vocabulary(self.tokenizer.vocab_size)
        (count,) = image_token_counts(self.image_processor, [image])
        text_ids = self._prompt_ids(asked.prompt, asked.name, asked.max_gen_len, count)
        ids = insert_image_tokens(text_ids, count, self.tokenizer.bos_id)
        spans = [] if image is None else [_span(ids, count, image)]
        # Without a seed, one comes from torch's generator, which torch.manual_seed sets.
        params = asked.params
        if params.temperature and params.seed is None:
            params = params.with_seed(int(torch.randint(2**62, ())))
        own = frozenset() if params.ignore_eos else frozenset(self.tokenizer.stop_ids)
        stop_ids = own.union(asked.stop_token_ids)
        request = Request(ids, params, asked.max_gen_len, stop_ids, spans, adapter=number, root=root, mask=asked.mask)
        return Writing(request, self.tokenizer, text_ids, asked.stops)

    def _adapter(self, name: str | None) -> tuple[int, bytes]:
        """The number and the digest of a request's adapter."""
        if name is None:
            return -1, b""
        names = [known for known, _ in self.adapters]
        if name not in names:
            known = f"loaded: {', '.join(names)}" if names else "the model was loaded without adapters"
            raise InputError(f"adapter: got {name!r:.60}, but {known}")
        number = names.index(name)
        return number, self.adapters[number][1]

    def _prompt_ids(self, prompt: Prompt, name: str, max_gen_len: int, image_tokens: int = 0) -> list[int]:
        """A prompt's token ids, without its image tokens. The beginning is cut if it leaves no room for the answer."""
        if isinstance(prompt, str):
            if not prompt:
                raise InputError(f"{name}: is empty; give at least one character")
            # The caller wrote the whole prompt, so control strings in it become control tokens, as in transformers.
            # Chat messages of users go through `data.conversation`, which keeps such strings as plain characters.
            ids = self.tokenizer.encode(prompt, bos=self.tokenizer.add_bos, special=True)
        else:
            try:
                ids = [index(i) for i in prompt]
            except TypeError as error:
                got = type(prompt).__name__
                raise InputError(f"{name}: got a {got}; give a string, or token ids as whole numbers") from error
        if not ids:
            raise InputError(f"{name}: has no tokens; a prompt needs at least one")
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            last = self.vocab_size - 1
            raise InputError(f"{name}: token ids must lie in 0 … {last} (vocab_size = {last + 1})")
        check_max_gen_len(max_gen_len, self.max_seq_len)
        room = self.max_seq_len - max_gen_len - image_tokens
        if image_tokens and room < 2:
            raise InputError(
                f"{name}: its image takes {image_tokens} positions, and with max_gen_len = {max_gen_len} that "
                f"leaves no room in max_seq_len = {self.max_seq_len}; give at least {image_tokens + max_gen_len + 2}"
            )
        if len(ids) > room:
            log.warning(
                "%s: %d tokens leave no room for max_gen_len = %d in max_seq_len = %d; the first %d are cut",
                name, len(ids) + image_tokens, max_gen_len, self.max_seq_len, len(ids) - room,
            )  # fmt: skip
            begins = 1 if ids[0] == self.tokenizer.bos_id and room > 1 else 0
            ids = ids[:begins] + ids[len(ids) - room + begins :]
        return ids


def _span(ids: Sequence[int], count: int, pixels: Tensor) -> ImageSpan:
    content = blake2b(pixels.numpy().tobytes(), digest_size=16).digest()
    return ImageSpan(ids.index(IMAGE_ID), count, content, pixels.numpy())
