"""`MultiGpuWrapper`: one process, the driver, uses a model on several ranks. Each rank is a separate process.

The driver holds the engine's scheduler and the text, and is no rank itself. It sends each step's plan to all ranks; the
first one answers. When a rank dies or hangs, the driver ends all ranks, and the next call starts new ones.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from accessory.arguments import check_port
from accessory.build.adapters import adapter_roots
from accessory.engine.engine import Engine
from accessory.engine.rank_executor import RankExecutor
from accessory.errors import InputError, RankError
from accessory.launch.gpus import count_ranks, default_device
from accessory.launch.process_group import host_store
from accessory.launch.rank_processes import LOOPBACK, RankProcess, start_processes
from accessory.launch.threads import cores, use_cores
from accessory.model.loading import Loading, PathLike
from accessory.model.text_model import TextModel

log = logging.getLogger(__name__)

RANK_MODULE = "accessory.model.rank_worker"


class MultiGpuWrapper(TextModel):
    """A model on `gpus` ranks, or on the GPUs `gpu_ids`, with `MetaModel`'s methods. Without CUDA, or with
    device="cpu", the ranks share the CPU.

    The other arguments are those of `MetaModel.from_pretrained`. The ranks meet at `master_addr` and `master_port`; the
    default is a free port that only this machine can reach. Ranks that send nothing for `load_timeout` seconds while
    loading, or for `step_timeout` seconds during a step, are ended. Several threads may call at once; the engine
    answers them together. Logits come on the CPU. Use the wrapper as a context manager, or `close` it. It is also
    closed when it is dropped and when this process ends.

    Raises the errors of `MetaModel` for wrong input, and RankError when ranks die, hang or fail.
    """

    def __init__(
        self,
        pretrained_path: PathLike | Sequence[PathLike],
        *,
        gpus: int | None = None,
        gpu_ids: Sequence[int] | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
        load_timeout: float = 3600,
        step_timeout: float = 600,
        **from_pretrained: Any,
    ) -> None:
        asked = Loading(pretrained_path=pretrained_path, **from_pretrained)
        device = asked.device or default_device()
        if device not in ("cpu", "cuda"):
            raise InputError(f"device: got {device!r}, but each rank has one of its own; give cpu, or cuda and gpu_ids")
        self.size = count_ranks(gpus, gpu_ids, shown=torch.cuda.device_count() if device == "cuda" else None)
        if master_port is not None:
            check_port(master_port, "master_port")
        ids: Sequence[int | None] = gpu_ids if gpu_ids is not None else range(self.size)
        asked.fetch()
        spec, self.tokenizer = asked.open(self.size)  # what is wrong shows here, before any rank starts
        self.args, self.max_seq_len, self.image_processor = spec.args, asked.max_seq_len, None
        self.adapters = adapter_roots(spec)
        if asked.with_visual:
            from accessory.model.image_processor import ImageProcessor

            self.image_processor = ImageProcessor(spec.args.sees_with, spec.image_views, asked.image_transform)
        if device == "cpu":
            use_cores()  # which the ranks then share
            if self.size > cores():
                log.warning("%d ranks share %d cores; as many ranks as cores are quicker", self.size, cores())
        self._ranks = RankExecutor(
            partial(
                _start,
                [None] * self.size if device == "cpu" else ids,
                (master_addr or LOOPBACK, master_port or 0),
                load_timeout,
            ),
            asked.to_dict(),
            ahead=0 if device == "cpu" else 1,
            load_timeout=load_timeout,
            step_timeout=step_timeout,
        )
        _opened.add(self)
        self._made: Engine | None = None
        self._made = Engine.of(self._ranks, self._ranks.load())

    def engine(self) -> Engine:
        assert self._made is not None
        return self._made

    def close(self) -> None:
        """End the ranks, also in the middle of another thread's call. A later call starts them again."""
        self._ranks.stop()
        if self._made is not None:
            self._made.close(RankError("the ranks were closed while generating"))

    def __enter__(self) -> MultiGpuWrapper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


_opened: weakref.WeakSet[MultiGpuWrapper] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for wrapper in list(_opened):
        wrapper.close()


def _start(gpu_ids: Sequence[int | None], meeting: tuple[str, int], patience: float, ranks: list[RankProcess]) -> Any:
    """Start the ranks. Returns the store through which they meet: it must live as long as they do."""
    host, port = meeting
    store = host_store(host, port)
    start_processes(RANK_MODULE, gpu_ids, host, store.port, patience, ranks)
    return store
