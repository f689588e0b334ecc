"""`TextModel`: what `MetaModel` and `MultiGpuWrapper` share. Prompts become requests to the engine, tokens become text.

Legend: T tokens, V vocabulary, P height and width in pixels.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accessory.arguments import check_max_gen_len, check_stops
from accessory.config import ModelArgs
from accessory.data.image_tokens import insert_image_tokens
from accessory.data.tokenizer import Tokenizer
from accessory.engine.engine import Engine, told_again
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.sequence import ImageSpan
from accessory.engine.sequence import Sequence as Request
from accessory.errors import AccessoryError, InputError
from accessory.model.prompts import Prompt, count_prompts, image_token_counts, open_images, open_prompt
from accessory.model.scoring import Scorer
from accessory.model.writing import Completion, StreamItem, TextRequest, Writing
from accessory.vision_config import IMAGE_ID

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
    """Generates and scores text. A subclass gives the five attributes and `_engine`.

    `image_processor` is None for a text-only model. `adapters`: a digest of the content of each adapter that requests
    may name; its place is its number.
    """

    tokenizer: Tokenizer
    max_seq_len: int
    args: ModelArgs
    image_processor: ImageProcessor | None
    adapters: Mapping[str, bytes]

    def _engine(self) -> Engine:
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
        tokens. In fp32 a prompt gets the same answer in a batch as alone. In bf16 and fp16 it does so except where two
        tokens are nearly equally likely: products of another size round otherwise. If a prompt leaves no room for
        `max_gen_len` in `max_seq_len`, its beginning is cut (never its BOS), with a warning. `cancelled` is called once
        a step (on the first of several ranks); when it returns true, the texts end there. `on_step` is called after
        each step with the tokens of the longest text. adapter: the name of one of the adapters that the model was
        loaded with, for all prompts, or one for each; None: none.

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
                    prompt, pixels = open_prompt(self.image_processor, request.prompt, request.image, request.name)
                    writing = self._writing(replace(request, prompt=prompt), pixels)
                    self._engine().check(writing.request)
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
            writing = self._writing(asked, image)
            if params.temperature and params.seed is not None:
                request, ids = writing.request, tuple(writing.request.ids)
                request.params = replace(params, copy=params.copy + copies[ids])
                copies[ids] += 1
            made.append(writing)
        for writing in made:
            self._engine().check(writing.request)
        return made

    def _writing(self, asked: TextRequest, image: Tensor | None) -> Writing:
        """What is asked, as a request to the engine. image: the pixels of its image, which is open."""
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
        stop_ids = frozenset() if params.ignore_eos else frozenset(self.tokenizer.stop_ids)
        number, root = self._adapter(asked.adapter)
        request = Request(ids, params, asked.max_gen_len, stop_ids, spans, adapter=number, root=root)
        return Writing(request, self.tokenizer, text_ids, asked.stops)

    def _adapter_names(self, adapter: Adapter | Sequence[Adapter], prompts: int) -> list[Adapter]:
        """The name of each prompt's adapter."""
        names = [adapter] * prompts if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != prompts:
            raise InputError(f"adapter: got {len(names)} for {prompts} prompts; give one for each, or one for all")
        return names

    def _adapter(self, name: Adapter) -> tuple[int, bytes]:
        """The number and the digest of a request's adapter."""
        if name is None:
            return -1, b""
        if name not in self.adapters:
            known = f"loaded: {', '.join(self.adapters)}" if self.adapters else "the model was loaded without adapters"
            raise InputError(f"adapter: got {name!r:.60}, but {known}")
        return list(self.adapters).index(name), self.adapters[name]

    def _read(
        self, writings: Iterable[Writing], cancelled: Callable[[], bool] | None = None
    ) -> Iterator[tuple[int, Writing, str]]:
        """Yield (number, writing, new text) whenever an answer has grown, and when it has ended, also in an error."""
        engine, left = self._engine(), iter(writings)
        at_once: dict[int, Writing] = {}  # by number, so the first one is the oldest
        begun = 0
        try:
            while True:
                while len(at_once) < AT_ONCE and begun - next(iter(at_once), begun) < AHEAD:
                    if (writing := next(left, None)) is None:
                        break
                    if not writing.request.finished:
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
        if not 0 <= min(ids) <= max(ids) < self.args.vocab_size:
            last = self.args.vocab_size - 1
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
                self._engine().score, self.tokenizer, self.args.vocab_size, self.max_seq_len, self.image_processor
            )
            return ask(scorer)
            yield

        return _outcome(self._together(work()))


def _span(ids: Sequence[int], count: int, pixels: Tensor) -> ImageSpan:
    content = blake2b(pixels.numpy().tobytes(), digest_size=16).digest()
    return ImageSpan(ids.index(IMAGE_ID), count, content, pixels.numpy())


def _outcome(work: Generator[Any, None, Any]) -> Any:
    """Run a generator to its end; its return value."""
    try:
        while True:
            next(work)
    except StopIteration as end:
        return end.value
