"""`TextModel`: what `MetaModel` and `MultiGpuWrapper` share. Prompts become requests to the engine, tokens become text.

Legend: T tokens, V vocabulary, P height and width in pixels.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accessory.config import ModelArgs
from accessory.data.tokenizer import Tokenizer
from accessory.engine.engine import Engine, told_again
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.sequence import Sequence as Request
from accessory.engine.warm_up import warm_up
from accessory.errors import AccessoryError, InputError
from accessory.model.prompts import Prompt, count_prompts, open_images
from accessory.model.requests import RequestMaker
from accessory.model.scoring import Scorer
from accessory.model.writing import Completion, StreamItem, TextRequest, Writing

if TYPE_CHECKING:
    from accessory.model.image_processor import Image, ImageProcessor, Images

log = logging.getLogger(__name__)

Adapter = str | None  # the name of a loaded adapter

# Requests of one call that the engine has at once. A call with more adds them as others end.
AT_ONCE = 512
# Requests from the first one that has not ended to the last one that has begun. A caller that wants the answers in
# their order keeps at most so many.
AHEAD = 4 * AT_ONCE


class TextModel:
    """Generates and scores text. A subclass gives the five attributes and `engine`.

    `image_processor` is None for a text-only model. `adapters`: a digest of the content of each adapter that requests
    may name; its place is its number.
    """

    tokenizer: Tokenizer
    max_seq_len: int
    args: ModelArgs
    image_processor: ImageProcessor | None
    adapters: Mapping[str, bytes]
    warmed_up = False  # whether `warm_up` was called

    def engine(self) -> Engine:
        raise NotImplementedError

    @property
    def image_words(self) -> int:
        """The number of image tokens of an image; 0 for a text-only model."""
        return 0 if self.image_processor is None else self.image_processor.image_tokens

    # ----------------------------------------------------------------- generating

    def generate(
        self,
        prompts: Sequence[Prompt],
        images: Images = None,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        additional_stop_symbols: Iterable[str] = (),
        seed: int | None = None,
        cancelled: Callable[[], bool] | None = None,
        on_step: Callable[[int], None] | None = None,
        adapter: Adapter | Sequence[Adapter] = None,
        **sampling: Any,
    ) -> list[str]:
        """The text that the model writes after each prompt. A prompt is a string, or token ids, which are not changed.

        images: one for each prompt: a path, a PIL image, a tensor of (3, P, P) pixels as `image_processor.open` makes
        them, or None for a prompt without an image. Or all of them as one tensor (prompts, 3, P, P). An image takes
        `image_words` positions.

        A text ends at an end-of-sequence token, before the first of `additional_stop_symbols`, or after `max_gen_len`
        tokens. A prompt gets the same answer in a batch as alone except where two tokens are nearly equally likely:
        products of another size round otherwise. In fp32 that is hardly ever so, in bf16 and fp16 it is now and then;
        with `deterministic` of `from_pretrained` it is never so. If a prompt leaves no room for `max_gen_len` in
        `max_seq_len`, its beginning is cut (never its BOS), with a warning. `cancelled` is called once a step (on the
        first of several ranks); when it returns true, the texts end there. `on_step` is called after each step with the
        tokens of the longest text. adapter: the name of one of the adapters that the model was loaded with, for all
        prompts, or one for each; None: none.

        sampling: the other fields of `SamplingParams`: top_k, min_p, repetition_penalty and so on. With a seed, equal
        prompts of one call are answered as copies 0, 1, 2 … of one request, which draw other numbers.

        Several threads may call at once; the engine answers them together.
        """
        params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed, **sampling)
        completions = self.complete(prompts, images, max_gen_len, params, additional_stop_symbols, cancelled, on_step,
                                    adapter)  # fmt: skip
        return [completion.text for completion in completions]

    def stream_generate(
        self,
        prompt: Prompt,
        image: Image | None = None,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        additional_stop_symbols: Iterable[str] = (),
        seed: int | None = None,
        cancelled: Callable[[], bool] | None = None,
        adapter: Adapter = None,
        **sampling: Any,
    ) -> Iterator[StreamItem]:
        """Yield the answer while it is written. Each item has all text so far; the last one has `end_of_content` set.

        Text appears only when it is final: never half a character, never part of a stop symbol.
        """
        params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed, **sampling)
        for answer in self.stream(prompt, image, max_gen_len, params, additional_stop_symbols, cancelled, adapter):
            if answer.finish_reason is None:
                yield {"text": answer.text, "end_of_content": False}
        yield {"text": answer.text, "end_of_content": True}

    def stream(
        self,
        prompt: Prompt,
        image: Image | None = None,
        max_gen_len: int = 512,
        params: SamplingParams | None = None,
        additional_stop_symbols: Iterable[str] = (),
        cancelled: Callable[[], bool] | None = None,
        adapter: Adapter = None,
    ) -> Iterator[Completion]:
        """Yield the answer whenever its text has grown, and once it has ended: the same object each time."""
        images = None if image is None else [image]

        def states() -> Generator[Completion]:
            (writing,) = self._requests(
                [prompt], images, max_gen_len, params or SamplingParams(), additional_stop_symbols, adapter
            )
            for _, _, new in self._read([writing], cancelled):
                writing.answer.raise_error()
                if new and writing.answer.finish_reason is None:
                    yield writing.answer
            yield writing.answer

        yield from self._together(states())

    def complete(
        self,
        prompts: Sequence[Prompt],
        images: Images = None,
        max_gen_len: int = 512,
        params: SamplingParams | None = None,
        additional_stop_symbols: Iterable[str] = (),
        cancelled: Callable[[], bool] | None = None,
        on_step: Callable[[int], None] | None = None,
        adapter: Adapter | Sequence[Adapter] = None,
    ) -> list[Completion]:
        """As `generate`, with all that is known of each answer: tokens, why it ended, log-probabilities."""
        count_prompts(prompts)

        def all_of_them() -> Generator[Any, None, list[Completion]]:
            writings = self._requests(
                prompts, images, max_gen_len, params or SamplingParams(), additional_stop_symbols, adapter
            )
            longest = 0
            for _, writing, _ in self._read(writings, cancelled):
                writing.answer.raise_error()
                if on_step is not None and len(writing.answer.token_ids) > longest:
                    on_step(longest := len(writing.answer.token_ids))
            return [writing.answer for writing in writings]
            yield

        return _outcome(self._together(all_of_them()))

    def answers(
        self,
        requests: Iterable[TextRequest | AccessoryError],
        cancelled: Callable[[], bool] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (number, answer) of each request when it ends, in whatever order.

        requests: of `accessory.model.writing.TextRequest`, each with a prompt, an image and settings. One is taken when
        there is room for it among those that go on, so there may be more than memory holds. One that cannot be answered
        gets a `Completion` with its `error`, and the others go on. An error in place of a request is taken too: its
        caller could not make one. `on_step` is called whenever an answer has grown, with the number of its new tokens.
        When `cancelled` returns true, what is not answered then is not yielded.
        """

        def writings() -> Iterator[Writing]:
            for request in requests:
                try:
                    if isinstance(request, AccessoryError):
                        raise request
                    writing = self.writing(request)
                    self.engine().check(writing.request)
                except AccessoryError as error:
                    writing = Writing.refused(told_again(error), self.tokenizer)
                yield writing

        def ended() -> Generator[tuple[int, Completion]]:
            for number, writing, _ in self._read(writings(), cancelled):
                if on_step is not None and writing.taken:
                    on_step(writing.taken)
                if writing.answer.finish_reason is not None:
                    yield number, writing.answer

        yield from self._together(ended())

    def _requests(
        self,
        prompts: Sequence[Prompt],
        images: Images,
        max_gen_len: int,
        params: SamplingParams,
        stops: Iterable[str],
        adapter: Adapter | Sequence[Adapter] = None,
    ) -> list[Writing]:
        """A request for each prompt. Raises InputError for what cannot be answered, before any is computed."""
        stops = [stops] if isinstance(stops, str) else list(stops)
        prompts, pixels = open_images(self.image_processor, prompts, images, "prompt")
        names = self._adapter_names(adapter, len(prompts))
        copies: Counter[tuple[int, ...]] = Counter()
        made = []
        for row, (prompt, image) in enumerate(zip(prompts, pixels, strict=True)):
            asked = TextRequest(prompt, None, max_gen_len, params, stops, f"prompts[{row}]", names[row])
            writing = self._maker().make(asked, image)
            if params.temperature and params.seed is not None:
                request, ids = writing.request, tuple(writing.request.ids)
                request.params = replace(params, copy=params.copy + copies[ids])
                copies[ids] += 1
            made.append(writing)
        for writing in made:
            self.engine().check(writing.request)
        return made

    def writing(self, asked: TextRequest) -> Writing:
        """A request that the engine can take, and its answer. Raises InputError for what cannot be answered."""
        return self._maker().open(asked)

    def _maker(self) -> RequestMaker:
        return RequestMaker(
            self.tokenizer, self.args.vocab_size, self.max_seq_len, self.image_processor, list(self.adapters.items())
        )

    def _adapter_names(self, adapter: Adapter | Sequence[Adapter], prompts: int) -> list[Adapter]:
        """The name of each prompt's adapter."""
        names = [adapter] * prompts if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != prompts:
            raise InputError(f"adapter: got {len(names)} for {prompts} prompts; give one for each, or one for all")
        return names

    def _read(
        self, writings: Iterable[Writing], cancelled: Callable[[], bool] | None = None
    ) -> Iterator[tuple[int, Writing, str]]:
        """Yield (number, writing, new text) whenever an answer has grown, and when it has ended, also in an error."""
        engine, left = self.engine(), iter(writings)
        at_once: dict[int, Writing] = {}  # by number, so the first one is the oldest
        begun = 0
        try:
            while True:
                while len(at_once) < AT_ONCE and begun - next(iter(at_once), begun) < AHEAD:
                    if (writing := next(left, None)) is None:
                        break
                    if not writing.request.finished:
                        writing.began = time.monotonic()
                        engine.add(writing.request)
                    at_once[begun] = writing
                    begun += 1
                if not at_once or (cancelled is not None and cancelled()):
                    return
                engine.advance([writing.request for writing in at_once.values()])
                for number, writing in list(at_once.items()):
                    if not (writing.request.drawn or writing.request.finished):
                        continue
                    new = writing.take(lambda request: engine.finish(request, stopped=True))
                    if writing.answer.finish_reason is not None:
                        del at_once[number]
                    yield number, writing, new
        finally:
            for writing in at_once.values():
                engine.finish(writing.request)
                writing.answer.finish_reason = writing.answer.finish_reason or "abort"

    def _together(self, work: Generator[Any, None, Any]) -> Generator[Any, None, Any]:
        """Do the work. On ranks that share a model, the first one does it and the others follow (`MetaModel`)."""
        return (yield from work)

    # ----------------------------------------------------------------- warming up

    def warm_up(self, progress: bool = False) -> None:
        """On a GPU, compile every kernel and capture every CUDA graph that answers need, before anybody waits for one.

        Otherwise the first step of each size takes up to seconds. Prompts of all sizes are computed, and as many
        sequences decode at once as there are pages for. It takes longest the first time on a machine: Triton keeps its
        kernels on disk. Nothing stays in the cache; what prompts shared before is forgotten, so call it before the
        model is asked. On a CPU there is nothing to compile, and nothing is done. progress: show a progress bar.
        """

        def work() -> Generator[Any, None, None]:
            engine = self.engine()
            if engine.compiles:
                warm_up(engine, len(self.adapters), self._with_image(), progress)
            return
            yield

        _outcome(self._together(work()))
        self.warmed_up = True

    def _with_image(self) -> list[Request]:
        """A request with an image, where the model takes any."""
        if self.image_processor is None:
            return []
        size = self.image_processor.pixels
        try:
            asked = TextRequest([0], max_gen_len=1)
            request = self._maker().make(asked, torch.zeros(3, size, size)).request
            self.engine().check(request)
        except InputError:  # context or cache have no room for any image
            return []
        return [request]

    # ----------------------------------------------------------------- scoring

    def compute_logits(
        self, examples: Sequence[Prompt], images: Images = None, bos: bool = True, eos: bool = False
    ) -> list[Tensor]:
        """The logits after each token of each example: a list of (T, V), fp32, on the model's device.

        `bos` and `eos` add BOS and EOS to strings; token ids are not changed. An example longer than `max_seq_len` is
        an InputError, because nothing may be cut here. images: as for `generate`; the logits after BOS are then those
        after BOS and the image that follows it.
        """
        return self._scored(lambda scorer: scorer.compute_logits(examples, images, bos, eos))

    def evaluate_examples(
        self,
        examples: Sequence[Prompt],
        contexts: Sequence[Prompt] | None = None,
        images: Images = None,
        bos: bool = True,
        eos: bool = False,
    ) -> dict[str, list]:
        """The likelihood of each example under the model, given its context if there is one.

        contexts: each example must begin with its context, and only the tokens after the context are scored. Without
        contexts, all tokens after the first are scored. Returns lists with one entry an example: `log_likelihood` (sum
        over the scored tokens, nats), `ppl` (perplexity: exp of the mean negative log-likelihood), `max_equal` (whether
        greedy decoding would give the example), `non_context_logits` ((scored tokens, V), fp32).
        """
        return self._scored(lambda scorer: scorer.evaluate_examples(examples, contexts, images, bos, eos))

    def _scored(self, ask: Callable[[Scorer], Any]) -> Any:
        def work() -> Generator[Any, None, Any]:
            scorer = Scorer(
                self.engine().score, self.tokenizer, self.args.vocab_size, self.max_seq_len, self.image_processor
            )
            return ask(scorer)
            yield

        return _outcome(self._together(work()))


def _outcome(work: Generator[Any, None, Any]) -> Any:
    """Run a generator to its end; its return value."""
    try:
        while True:
            next(work)
    except StopIteration as end:
        return end.value
