"""`MetaModel` loads a checkpoint folder and generates text with it. It has nothing to do with torch's meta device.

Its name and import path are LLaMA2-Accessory's. The generation loop is in `engine`; `scoring` scores given texts.

Legend: T tokens, V vocabulary, P height and width in pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from accessory.arguments import check_max_gen_len
from accessory.build import build, build_tower
from accessory.config import ModelArgs
from accessory.data.detokenizer import StopScanner, StreamDecoder
from accessory.data.image_tokens import insert_image_tokens
from accessory.data.tokenizer import Tokenizer, check_vocabulary
from accessory.engine.generate import Generation
from accessory.engine.graphs import DecodeGraphs
from accessory.engine.sampling import Sampling
from accessory.errors import InputError
from accessory.launch.gpus import default_device
from accessory.model.loading import Loading, PathLike
from accessory.model.memory import ModelMemory
from accessory.model.prompts import Prompt, count_prompts, image_token_counts, open_images
from accessory.model.scoring import Scorer
from accessory.nn.decoder import Decoder
from accessory.parallel.mesh import DeviceMesh, Ranks
from accessory.planner.setup import Inference

if TYPE_CHECKING:
    from accessory.model.image_processor import Image, ImageProcessor, Images

log = logging.getLogger(__name__)


class StreamItem(TypedDict):
    text: str  # everything generated so far
    end_of_content: bool  # true for the last item only


class MetaModel(nn.Module):
    """A decoder (`llma`), its `tokenizer`, and its `image_processor` where it takes images. `from_pretrained` makes it.

    max_seq_len: tokens of prompt and answer together. ranks: the ranks that share the decoder; None for one process.
    memory: what the planner is asked about the model; without it, memory is not checked.
    """

    def __init__(
        self,
        llma: Decoder,
        tokenizer: Tokenizer,
        max_seq_len: int = 4096,
        ranks: Ranks | None = None,
        image_processor: ImageProcessor | None = None,
        memory: ModelMemory | None = None,
    ) -> None:
        super().__init__()
        check_vocabulary(tokenizer, llma.args.vocab_size)
        self.llma, self.tokenizer, self.max_seq_len = llma, tokenizer, max_seq_len
        self._graphs = DecodeGraphs(llma)
        self._ranks = ranks
        self.image_processor = image_processor
        self._memory = memory

    @property
    def sees(self) -> bool:
        """Whether prompts may have images."""
        return self.image_processor is not None

    @property
    def image_words(self) -> int:
        """The number of image tokens of an image; 0 for a text-only model."""
        return 0 if self.image_processor is None else self.image_processor.image_tokens

    @property
    def args(self) -> ModelArgs:
        return self.llma.args

    @property
    def device(self) -> torch.device:
        return self.llma.tok_embeddings.weight.device

    @classmethod
    def from_pretrained(
        cls,
        pretrained_path: PathLike | Sequence[PathLike],
        llama_type: str | None = None,
        llama_config: PathLike | Sequence[PathLike] | None = None,
        tokenizer_path: PathLike | None = None,
        with_visual: bool = False,
        max_seq_len: int = 4096,
        mp_group: Any = None,
        dtype: torch.dtype | str = torch.bfloat16,
        device: torch.device | str | int | None = None,
        quant: bool | str = False,
        *,
        quant_attention: str | None = None,
        quant_output: str | None = None,
        image_transform: str = "padded_resize",
        progress: bool = False,
    ) -> MetaModel:
        """Load a checkpoint of any layout into either implementation.

        pretrained_path: a folder or `hf://owner/name[/folder]`, or several: later ones replace tensors of earlier ones.
        llama_type: "mixtral" or "mixtral_sparse"; a folder of any layout loads as either. The default is the type in
        meta.json. LoRA adapters and biases in the folders are loaded too, whether or not the type ends in "_peft".
        llama_config: JSON files whose keys win over the folder's own. tokenizer_path: by default found in the folders.
        max_seq_len: tokens of prompt and answer together. dtype: torch's, or its name ("bf16", "bfloat16", …).
        device: by default "cuda" if there is one, else "cpu".
        quant: "int8", "fp8", "int4" or "nf4" (also True): experts and attention are quantised while they are loaded,
        and with int8 the output head too. `quant_attention` and `quant_output` set the format of those parts, or
        "none". For a folder made by `accessory quantize`, leave all three out: it is loaded as it is.
        with_visual: load the image encoders too. Then `llama_type`, or the folder's own, must end in _ens or _ens5.
        Without it, such a model takes text only. Encoders whose weights the folders lack are loaded from the place
        that the configuration names. image_transform: how an image becomes a square, see
        `data.transform.get_transform`.
        mp_group: a torch.distributed group whose ranks, 2, 4 or 8 for example, share the model. Each rank must call
        every method with the same arguments, and gets the same result.

        Raises CheckpointError, ConfigError and InputError, which name the file, tensor or argument; InputError too,
        before anything is loaded, where the weights take more than the memory that is free. Where memory runs out
        later, in any method, MemoryFullError says what was asked for, what there is, and what would fit.
        """
        asked = Loading(
            pretrained_path=pretrained_path,
            llama_type=llama_type,
            llama_config=llama_config,
            tokenizer_path=tokenizer_path,
            with_visual=with_visual,
            max_seq_len=max_seq_len,
            dtype=dtype,
            device=device,
            quant=quant,
            quant_attention=quant_attention,
            quant_output=quant_output,
            image_transform=image_transform,
        )
        ranks = None if mp_group is None else Ranks.of(mp_group)
        spec, tokenizer = asked.open(1 if ranks is None else ranks.size)
        where = {"device": asked.device or default_device(), "dtype": asked.dtype}
        progress = progress and (ranks is None or ranks.rank == 0)
        mesh, processor = DeviceMesh(model=ranks), None
        planned = spec.planned(Inference(), tp=mesh.model_size, dp=1, **where)
        memory = ModelMemory(planned, torch.device(where["device"]), mp_group)
        memory.check_loading(max_seq_len)
        with memory.explained(1, max_seq_len):
            llma = build(spec, mesh, **where, progress=progress)
            if with_visual:
                from accessory.model.image_processor import ImageProcessor  # text-only models do not need it

                tower = build_tower(spec, **where, progress=progress)
                processor = ImageProcessor(tower, image_transform, ranks)
        return cls(llma, tokenizer, max_seq_len, ranks, processor, memory)

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
        each step with the number of steps, which is that of the longest text's tokens.
        """
        texts = [""] * count_prompts(prompts)
        for row, text, _ in self._stream(
            prompts, images, max_gen_len, temperature, top_p, additional_stop_symbols, seed, cancelled, on_step
        ):
            texts[row] += text
        return texts

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
    ) -> Iterator[StreamItem]:
        """Yield the answer while it is written. Each item has all text so far; the last one has `end_of_content` set.

        Text appears only when it is final: never half a character, never part of a stop symbol.
        """
        images = None if image is None else [image]
        whole = ""
        for _, text, ended in self._stream(
            [prompt], images, max_gen_len, temperature, top_p, additional_stop_symbols, seed, cancelled
        ):
            whole += text
            if text and not ended:
                yield {"text": whole, "end_of_content": False}
        yield {"text": whole, "end_of_content": True}

    def _stream(
        self,
        prompts: Sequence[Prompt],
        images: Images,
        max_gen_len: int,
        temperature: float,
        top_p: float,
        stops: Iterable[str],
        seed: int | None,
        cancelled: Callable[[], bool] | None,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, str, bool]]:
        """Yield (row, new text, whether the row has ended) whenever text becomes final."""
        prompts, pixels = open_images(self.image_processor, prompts, images, "prompt")
        stops = [stops] if isinstance(stops, str) else list(stops)
        counts = image_token_counts(self.image_processor, pixels)
        prompt_ids = [self._prompt_ids(p, n, max_gen_len, counts[n]) for n, p in enumerate(prompts)]
        rows = [insert_image_tokens(ids, n, self.tokenizer.bos_id) for ids, n in zip(prompt_ids, counts, strict=True)]
        tokens = max(map(len, rows)) + max_gen_len
        if self._memory is not None:
            self._memory.check_generation(len(rows), tokens, self._graphs.kept_bytes)
        with self._explained(len(rows), tokens):
            generation = Generation(
                self.llma,
                rows,
                max_gen_len=max_gen_len,
                max_seq_len=self.max_seq_len,
                sampling=Sampling(temperature, top_p, seed),
                stop_ids=self.tokenizer.stop_ids,
                vocab_size=self.tokenizer.vocab_size,
                graphs=self._graphs,
                ranks=self._ranks,
                cancelled=cancelled,
                images=None if self.image_processor is None else self.image_processor.features(pixels),
            )
            yield from self._texts(generation, prompt_ids, stops, on_step)

    def _texts(
        self,
        generation: Generation,
        prompt_ids: Sequence[list[int]],
        stops: Sequence[str],
        on_step: Callable[[int], None] | None,
    ) -> Iterator[tuple[int, str, bool]]:
        decoders = [StreamDecoder(self.tokenizer, ids) for ids in prompt_ids]
        scanners = [StopScanner(stops) for _ in prompt_ids]
        for n_step, step in enumerate(generation, start=1):
            if on_step is not None:
                on_step(n_step)
            for row, token in enumerate(step):
                if token is None:
                    continue
                ended = token in self.tokenizer.stop_ids or n_step == generation.max_gen_len
                text = "" if token in self.tokenizer.stop_ids else decoders[row].push(token)
                text = scanners[row].push(text + decoders[row].flush() if ended else text)
                if scanners[row].stopped:
                    ended = True
                    generation.finish(row)
                elif ended:
                    text += scanners[row].flush()
                yield row, text, ended

    def _prompt_ids(self, prompt: Prompt, row: int, max_gen_len: int, image_tokens: int = 0) -> list[int]:
        """A prompt's token ids, without its image tokens. The beginning is cut if it leaves no room for the answer."""
        if isinstance(prompt, str):
            if not prompt:
                raise InputError(f"prompts[{row}]: is empty; give at least one character")
            # The caller wrote the whole prompt, so control strings in it become control tokens, as in transformers.
            # Chat messages of users go through `data.conversation`, which keeps such strings as plain characters.
            ids = self.tokenizer.encode(prompt, bos=self.tokenizer.add_bos, special=True)
        else:
            ids = list(prompt)
        check_max_gen_len(max_gen_len, self.max_seq_len)
        room = self.max_seq_len - max_gen_len - image_tokens
        if image_tokens and room < 2:
            raise InputError(
                f"prompts[{row}]: its image takes {image_tokens} positions, and with max_gen_len = {max_gen_len} that "
                f"leaves no room in max_seq_len = {self.max_seq_len}; give at least {image_tokens + max_gen_len + 2}"
            )
        if len(ids) > room:
            log.warning(
                "prompts[%d]: %d tokens leave no room for max_gen_len = %d in max_seq_len = %d; the first %d are cut",
                row, len(ids) + image_tokens, max_gen_len, self.max_seq_len, len(ids) - room,
            )  # fmt: skip
            begins = 1 if ids[0] == self.tokenizer.bos_id and room > 1 else 0
            ids = ids[:begins] + ids[len(ids) - room + begins :]
        return ids

    def compute_logits(
        self, examples: Sequence[Prompt], images: Images = None, bos: bool = True, eos: bool = False
    ) -> list[Tensor]:
        """The logits after each token of each example: a list of (T, V), fp32, on the model's device.

        `bos` and `eos` add BOS and EOS to strings; token ids are not changed. An example longer than `max_seq_len` is
        an InputError, because nothing may be cut here. images: as for `generate`; the logits after BOS are then those
        after BOS and the image that follows it.
        """
        with self._explained(min(len(examples), self.args.max_batch_size), self.max_seq_len):
            return self._scorer().compute_logits(examples, images, bos, eos)

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
        with self._explained(min(len(examples), self.args.max_batch_size), self.max_seq_len):
            return self._scorer().evaluate_examples(examples, contexts, images, bos, eos)

    def _scorer(self) -> Scorer:
        return Scorer(self.llma, self.tokenizer, self.max_seq_len, self.image_processor)

    def _explained(self, batch: int, tokens: int) -> AbstractContextManager[None]:
        """Say what was asked for where memory runs out inside."""
        return nullcontext() if self._memory is None else self._memory.explained(batch, tokens)
