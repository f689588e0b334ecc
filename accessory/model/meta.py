"""`MetaModel` loads a checkpoint folder and generates text with it. It has nothing to do with torch's meta device.

Its name and import path are LLaMA2-Accessory's. `TextModel` has what it does with text; the generation is in `engine`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accessory.arguments import FREE, check_cache_dtype, check_cache_gb
from accessory.build.adapters import adapter_roots, stand_adapters
from accessory.build.network import build, build_tower
from accessory.config import ModelArgs
from accessory.data.tokenizer import Tokenizer, check_vocabulary
from accessory.engine.engine import Engine
from accessory.engine.executor import ITEM, OUT_OF_STEP, Follower, GroupExecutor, LocalExecutor
from accessory.engine.runner import Runner, fitting_pages
from accessory.engine.worst_step import worst_step_bytes
from accessory.errors import InputError, RankError
from accessory.formats import CacheDtype
from accessory.launch.gpus import default_device
from accessory.launch.threads import use_cores
from accessory.limits import PAGE_SIZE
from accessory.model.loading import Loading, PathLike
from accessory.model.memory import ModelMemory
from accessory.model.text_model import TextModel
from accessory.model.writing import Completion, StreamItem
from accessory.nn.cache import bytes_a_page
from accessory.nn.decoder import Decoder
from accessory.parallel.images import encode_shared
from accessory.parallel.mesh import DeviceMesh, Ranks
from accessory.planner.cache import pages_in
from accessory.planner.setup import Inference

if TYPE_CHECKING:
    from accessory.nn.vision import Features, VisionTower

__all__ = ["Completion", "MetaModel", "StreamItem"]


class MetaModel(nn.Module, TextModel):
    """A decoder (`llma`), its `tokenizer`, and its image encoders where it takes images. `from_pretrained` makes it.

    max_seq_len: tokens of prompt and answer together. ranks: the ranks that share the decoder; None for one process.
    tower: the image encoders; None for text alone. image_transform: how an image becomes a square. memory: what the
    planner is asked about the model; without it, memory that runs out is not explained. adapters: digests by the names
    of the adapters that stand beside the decoder's weights. cache_dtype, cache_gb, deterministic: see
    `from_pretrained`.
    """

    def __init__(
        self,
        llma: Decoder,
        tokenizer: Tokenizer,
        max_seq_len: int = 4096,
        ranks: Ranks | None = None,
        tower: VisionTower | None = None,
        image_transform: str = "padded_resize",
        memory: ModelMemory | None = None,
        adapters: Mapping[str, bytes] | None = None,
        cache_dtype: CacheDtype | None = None,
        cache_gb: float | str | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        check_cache_dtype(cache_dtype)
        check_cache_gb(cache_gb)
        check_vocabulary(tokenizer, llma.args.vocab_size)
        self.llma, self.tokenizer, self.max_seq_len = llma, tokenizer, max_seq_len
        self.adapters = dict(adapters or {})
        self._ranks = ranks if ranks is not None and ranks.size > 1 else None
        self.tower, self._memory = tower, memory
        self._fp8, self._cache_gb, self._deterministic = cache_dtype == "fp8", cache_gb, deterministic
        self.image_processor = None
        if tower is not None:
            from accessory.model.image_processor import ImageProcessor  # here, because text-only models do not need it

            self.image_processor = ImageProcessor(tower.args, tower.views, image_transform)
            tower.graphed = True
        self._making = threading.Lock()
        self._made: Engine | Follower | None = None
        self._calls, self._calling = 0, 0  # calls that all ranks are in, and the thread that makes them
        self._leads = False

    @property
    def args(self) -> ModelArgs:  # type: ignore[override]
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
        adapters: Mapping[str, PathLike] | None = None,
        cache_dtype: CacheDtype | None = None,
        cache_gb: float | str | None = None,
        deterministic: bool = False,
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
        adapters: folders of adapters by name; a request names the one that it takes, or none. They may hold LoRA of any
        rank, biases, norms and routers, and stand beside the weights of any format.
        cache_dtype: "fp8" keeps keys and values in about half the memory of 16 bits, rounded to 4 significant bits. By
        default they have the dtype of the products.
        cache_gb: GB (10⁹ bytes) of the cache of keys and values, on each rank. By default it has room for
        `max_batch_size` (of the configuration) answers of `max_seq_len`, or what memory has. "free": 90 % of what a GPU
        has free beside the largest step, which is measured; half of what a CPU has.
        deterministic: a request's tokens and log-probabilities do not depend on what runs beside it, on its place in
        the batch or on how its prompt is cut into steps, bit for bit, in bf16 too. Kernels then have fixed tiles, which
        takes longer, and a request waits until the cache has room for its whole answer.
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
            adapters=adapters,
            cache_dtype=cache_dtype,
            cache_gb=cache_gb,
            deterministic=deterministic,
        )
        ranks = None if mp_group is None else Ranks.of(mp_group)
        spec, tokenizer = asked.open(1 if ranks is None else ranks.size)
        where = {"device": asked.device or default_device(), "dtype": asked.dtype}
        if ranks is None and torch.device(where["device"]).type == "cpu":
            use_cores()
        progress = progress and (ranks is None or ranks.rank == 0)
        mesh, tower = DeviceMesh(model=ranks), None
        planned = spec.planned(Inference(cache_dtype=cache_dtype), tp=mesh.model_size, dp=1, **where)
        memory = ModelMemory(planned, torch.device(where["device"]), mp_group)
        memory.check_loading(max_seq_len, cache_gb)
        with memory.explained(1, max_seq_len):
            llma = build(spec, mesh, **where, progress=progress)
            stand_adapters(llma, spec, mesh, dtype=asked.dtype)
            if with_visual:
                tower = build_tower(spec, **where, progress=progress)
        return cls(
            llma, tokenizer, max_seq_len, ranks, tower, image_transform, memory, adapter_roots(spec),
            cache_dtype, cache_gb, deterministic,
        )  # fmt: skip

    # ----------------------------------------------------------------- the engine

    def runner(self, pages: int | None = None) -> Runner:
        """A runner of this rank, with the cache that `from_pretrained` was asked for. Every rank must call this.

        pages: a cache of exactly so many pages, as ranks need that are started again.
        """
        pages = pages or self._pages()
        memory, see = self._memory, None if self.tower is None else self.encode_images
        explained: Callable[[], AbstractContextManager[None]] = nullcontext
        if memory is not None:
            explained = partial(memory.explained, max(1, (pages - 1) // self._longest), self.max_seq_len)
        return Runner(
            self.llma,
            pages=pages,
            max_seq_len=self.max_seq_len,
            vocab_size=self.tokenizer.vocab_size,
            fp8=self._fp8,
            see=see,
            ranks=self._ranks,
            explained=explained,
            deterministic=self._deterministic,
        )

    @property
    def _longest(self) -> int:
        """Pages of a sequence of `max_seq_len`."""
        return -(-self.max_seq_len // PAGE_SIZE)

    def _pages(self) -> int:
        """Pages of the cache."""
        llma, free = self.llma, self._cache_gb == FREE
        if self._cache_gb is not None and not isinstance(self._cache_gb, str):
            return pages_in(self._cache_gb, bytes_a_page(llma.args, llma.kv_heads, llma.products_in, self._fp8))
        beside, graph = 0, 0
        if self._memory is not None:
            beside, graph = self._memory.step_bytes(self.max_seq_len), self._memory.graph_bytes()
        if free and self.device.type == "cuda":
            measured = worst_step_bytes(self.runner, self.max_seq_len, self._ranks)
            # No image is in the measured steps. The estimate knows how much encoding takes.
            beside = measured if self.tower is None else max(measured + graph, beside)
        wanted = self.args.max_batch_size * self._longest + 1
        return fitting_pages(llma, wanted, self._ranks, beside, fp8=self._fp8, more=free)

    def encode_images(self, pixels: Sequence[Any]) -> Features:
        """The features of images of (3, P, P) pixels. The ranks of a group share the work, so all must call it."""
        assert self.tower is not None, "load the model with with_visual=True"
        return encode_shared(self.tower, torch.stack([torch.as_tensor(p) for p in pixels]), self._ranks)

    def _engine_or_follower(self) -> Engine | Follower:
        with self._making:
            if self._made is None:
                runner = self.runner()
                if self._ranks is not None and self._ranks.rank:
                    self._made = Follower(runner, self._ranks)
                else:
                    executor = LocalExecutor(runner) if self._ranks is None else GroupExecutor(runner, self._ranks)
                    self._made = Engine.of(executor, runner.about)
            return self._made

    def engine(self) -> Engine:
        engine = self._engine_or_follower()
        assert isinstance(engine, Engine), "a rank that follows asks for nothing"
        return engine

    # ----------------------------------------------------------------- several ranks

    def _together(self, work: Generator[Any, None, Any]) -> Generator[Any, None, Any]:
        """Every rank of a group makes the same calls. The first one does the work; what it was given counts."""
        if self._ranks is None or self._leads:
            return (yield from work)
        made = self._engine_or_follower()
        broken = made.broken if isinstance(made, Follower) else self.broken
        with self._making:
            if broken.is_set():
                raise RankError(OUT_OF_STEP)
            if self._calls and self._calling != threading.get_ident():
                raise InputError("mp_group: the ranks are in a call of another thread; make one call after the other")
            self._calling = threading.get_ident()
            self._calls += 1
        try:
            return (yield from made.follow() if isinstance(made, Follower) else self._lead_through(made, work))
        finally:
            self._calls -= 1

    def _lead_through(self, engine: Engine, work: Generator[Any, None, Any]) -> Generator[Any, None, Any]:
        """On the first rank: do the work, and tell the others its items and how it ends."""
        executor = engine.executor
        assert isinstance(executor, GroupExecutor)
        try:
            while True:
                item = next(work)
                executor.tell(ITEM, item)
                yield item
        except StopIteration as end:
            executor.end_call(end.value)
            return end.value
        except GeneratorExit:  # the reader of a stream left
            work.close()
            executor.end_call()
            raise
        except Exception as error:
            executor.end_call(error=error)
            raise

    @property
    def broken(self) -> threading.Event:
        """Set on the first of several ranks after a failure that the other ranks may not share."""
        executor = self.engine().executor
        return executor.broken if isinstance(executor, GroupExecutor) else threading.Event()

    def follow(self) -> None:
        """On every rank but the first: run what the first one asks for, until it leaves `lead`."""
        made = self._engine_or_follower()
        assert isinstance(made, Follower), "the first rank leads"
        for _ in made.follow():
            pass

    def lead(self) -> Lead:
        """On the first rank, as a context: any thread may call; the other ranks `follow`."""
        return Lead(self)


class Lead:
    """While it is entered, the first rank's threads call at any time, and the other ranks follow."""

    def __init__(self, model: MetaModel) -> None:
        self._model = model

    def __enter__(self) -> MetaModel:
        self._model._leads = True
        return self._model

    def __exit__(self, *_: object) -> None:
        self._model._leads = False
        self._model.engine().close(RankError("the ranks were closed while generating"))
