"""A request of text, and its answer while it is written: `TextRequest`, `Completion`, and `Writing` between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from accessory.data.detokenizer import StopScanner, StreamDecoder
from accessory.data.tokenizer import Tokenizer
from accessory.engine.engine import told_again
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.sequence import Draw, FinishReason
from accessory.engine.sequence import Sequence as Request
from accessory.model.prompts import Prompt

if TYPE_CHECKING:
    from accessory.model.image_processor import Image


class StreamItem(TypedDict):
    text: str  # everything generated so far
    end_of_content: bool  # true for the last item only


@dataclass
class Completion:
    """An answer, while it is written and when it is done."""

    prompt_tokens: int
    text: str = ""  # what is final: never half a character, never part of a stop text
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None  # of the tokens, natural logarithm
    top_logprobs: list[dict[int, float]] | None = None  # of the likeliest tokens at each place
    prompt_logprobs: list[float | None] | None = None  # of the prompt's tokens after the first; None for image tokens
    prompt_top_logprobs: list[dict[int, float]] | None = None  # of the likeliest tokens at each of these places
    cached_tokens: int = 0  # of the prompt, whose keys and values an earlier request had computed
    finish_reason: FinishReason | None = None  # None while it is written
    error: BaseException | None = None
    seconds: float | None = field(default=None, compare=False)  # from when the engine took it to its end

    def raise_error(self) -> None:
        """Raise the error that it ended with, if any: a copy, see `told_again`."""
        if self.error is not None:
            raise told_again(self.error)


@dataclass(frozen=True)
class TextRequest:
    """A prompt, and how it is to be answered.

    prompt: a string, or token ids. image: as one of `generate`'s images. params, stops: how its tokens are drawn, and
    the texts that end it. name: what messages call the prompt. adapter: the name of one that the model was loaded with.
    stop_token_ids: tokens that end it too. mask: says which tokens may be drawn, as a `Sequence`'s.
    """

    prompt: Prompt
    image: Image | None = None
    max_gen_len: int = 512
    params: SamplingParams = field(default_factory=SamplingParams)
    stops: Sequence[str] = ()
    name: str = "prompt"
    adapter: str | None = None
    stop_token_ids: Sequence[int] = ()
    mask: Callable[[list[int]], bytes | None] | None = None


class Writing:
    """One request's answer: drawn tokens in, final text out. `taken` tokens came with the last `take`."""

    taken = 0

    def __init__(self, request: Request, tokenizer: Tokenizer, text_ids: list[int], stops: Sequence[str]) -> None:
        self.began = time.monotonic()  # set anew when the engine takes the request
        self.request, self._stop_ids = request, tokenizer.stop_ids
        self._decoder, self._scanner = StreamDecoder(tokenizer, text_ids), StopScanner(stops)
        wanted = request.params.logprobs
        self.answer = Completion(
            request.prompt_length,
            logprobs=None if wanted is None else [],
            top_logprobs=[] if wanted else None,
        )

    @classmethod
    def refused(cls, error: BaseException, tokenizer: Tokenizer) -> Writing:
        """The answer to a request that cannot be made: it has ended with this error."""
        request = Request([], SamplingParams(), 0)
        request.error, request.finished = error, "error"
        return cls(request, tokenizer, [], ())

    def take(self, end: Callable[[Request], None]) -> str:
        """Take what the engine has drawn. Returns the new final text. end: tells the engine that a stop text came."""
        new, request, answer = "", self.request, self.answer
        before = len(answer.token_ids)
        while request.drawn and not self._scanner.stopped:
            draw = request.drawn.popleft()
            self._note(draw)
            new += self._scanner.push("" if draw.token in self._stop_ids else self._decoder.push(draw.token))
            # `finished` is read first: another thread's step sets it after it has added the last token.
            if request.finished in ("stop", "length") and not request.drawn and not self._scanner.stopped:
                new += self._scanner.push(self._decoder.flush())
                new += "" if self._scanner.stopped else self._scanner.flush()
        if self._scanner.stopped:
            end(request)
        answer.text += new
        self.taken = len(answer.token_ids) - before
        if (request.finished and not request.drawn) or self._scanner.stopped:
            answer.finish_reason = "stop" if self._scanner.stopped else request.finished
            answer.error, answer.cached_tokens = request.error, request.cached
            answer.seconds = time.monotonic() - self.began
            if request.params.prompt_logprobs is not None:
                answer.prompt_logprobs = [draw and draw.logprob for draw in request.prompt_logprobs]
                answer.prompt_top_logprobs = [(draw and draw.top) or {} for draw in request.prompt_logprobs]
        return new

    def _note(self, draw: Draw) -> None:
        answer = self.answer
        answer.token_ids.append(draw.token)
        if answer.logprobs is not None and draw.logprob is not None:
            answer.logprobs.append(draw.logprob)
        if answer.top_logprobs is not None and draw.top is not None:
            answer.top_logprobs.append(draw.top)
