"""`MultiGpuWrapper`: one process, the driver, uses a model on several ranks. Each rank is a separate process.

The driver and each rank talk over a local socket. When one of them dies, the socket ends and tells the other. The
driver sends a call to all ranks. The first rank sends the answer, and all ranks say when they are done, so all are in
step for the next call. When a rank dies or hangs, the driver ends all ranks, and the next call starts new ones.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accessory.arguments import check_port
from accessory.data.tokenizer import Tokenizer
from accessory.errors import AccessoryError, InputError, RankError
from accessory.launch.gpus import count_ranks, default_device
from accessory.launch.process_group import host_store
from accessory.launch.rank_processes import (
    GRACE,
    LOOPBACK,
    POLL,
    RankProcess,
    end_processes,
    start_processes,
    who_ended,
)
from accessory.model.loading import Loading, PathLike
from accessory.model.messages import arguments_to_send, from_plain, sampling_arguments
from accessory.model.meta import StreamItem
from accessory.model.prompts import Prompt

log = logging.getLogger(__name__)

Replies = Generator[Any, None, Any]
RANK_MODULE = "accessory.model.rank_worker"


class _Watch(NamedTuple):
    """What the caller asks and is told during a call."""

    cancelled: Callable[[], bool] | None = None
    on_step: Callable[[int], None] | None = None


NOBODY = _Watch()


class _Call:
    """A call that the ranks are working on, and the messages they have sent about it."""

    def __init__(self, doing: str, ranks: Sequence[RankProcess], patience: float, watch: _Watch = NOBODY) -> None:
        self.doing, self.patience, self.watch = doing, patience, watch
        self.waiting = {rank.connection: rank for rank in ranks}
        self.items: deque[Any] = deque()
        self.result: Any = None
        self.problems: dict[int, tuple[Any, ...]] = {}
        self.error: Exception | None = None
        self.left = self.told = False  # left: the caller has gone; told: the ranks know that the call is cancelled
        self.hearing = False  # true while a message is being received
        self.heard = time.monotonic()

    @property
    def over(self) -> bool:
        return self.error is not None or not self.waiting

    def hear(self, rank: RankProcess) -> None:
        self.hearing = True
        kind, *said = rank.connection.recv()
        self.hearing = False
        self.heard = time.monotonic()
        if kind == "item" and not self.left:
            self.items.append(said[0])
        if kind == "step" and self.watch.on_step is not None:
            self.watch.on_step(said[0])
        if kind in ("item", "step"):
            return
        del self.waiting[rank.connection]
        if kind == "done":
            self.result = said[0] if rank.number == 0 else self.result
        else:
            self.problems[rank.number] = (kind, *said)

    def failure(self, size: int) -> tuple[Exception, bool]:
        """The error to raise, and whether the ranks are still in step: they are if all failed in the same way."""
        everywhere = len(self.problems) == size
        # A rank that refuses breaks its connections to the others, which then fail for that reason alone.
        number, (kind, what, *trace) = min(self.problems.items(), key=lambda item: (item[1][0] != "refused", item[0]))
        refused = {kind for kind, *_ in self.problems.values()} == {"refused"}
        if everywhere and refused:
            return what, not isinstance(what, MemoryError)  # ranks need not run out of memory at the same moment
        if kind == "refused":
            return RankError(f"rank {number}, while {self.doing}: {what}"), False
        error = RankError(f"rank {number} failed while {self.doing}: {what}")
        error.__cause__ = Exception("".join(trace))
        return error, everywhere and len({what for _, what, *_ in self.problems.values()}) == 1

    def outcome(self) -> Any:
        error, self.error = self.error, None
        if error is None:
            return self.result
        self.waiting = {}
        try:
            raise error
        finally:
            del error  # it refers to this frame: the cycle would keep a dropped wrapper, and its ranks, alive


class MultiGpuWrapper:
    """A model on `gpus` ranks, or on the GPUs `gpu_ids`, with `MetaModel`'s methods. Without CUDA, or with
    device="cpu", the ranks share the CPU.

    The other arguments are those of `MetaModel.from_pretrained`. The ranks meet at `master_addr` and `master_port`; the
    default is a free port that only this machine can reach. Ranks that send nothing for `load_timeout` seconds while
    loading, or for `step_timeout` seconds during a call, are ended. Calls from several threads run one after the other.
    A call that begins while a stream is half read lets the ranks finish the stream first. Use the wrapper as a context
    manager, or `close` it. It is also closed when it is dropped and when this process ends.

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
        self._asked = Loading(pretrained_path=pretrained_path, **from_pretrained)
        device = self._asked.device or default_device()
        if device not in ("cpu", "cuda"):
            raise InputError(f"device: got {device!r}, but each rank has one of its own; give cpu, or cuda and gpu_ids")
        self.size = count_ranks(gpus, gpu_ids, shown=torch.cuda.device_count() if device == "cuda" else None)
        if master_port is not None:
            check_port(master_port, "master_port")
        ids = gpu_ids if gpu_ids is not None else range(self.size)
        self._gpu_ids: list[int | None] = [None] * self.size if device == "cpu" else list(ids)
        self._meeting = (master_addr or LOOPBACK, master_port or 0)
        self._load_timeout, self._step_timeout = load_timeout, step_timeout
        self._asked.fetch()
        self.tokenizer: Tokenizer
        _, self.tokenizer = self._asked.open(self.size)  # what is wrong shows here, before any rank starts
        if device == "cpu" and self.size > (cores := os.cpu_count() or 1):
            log.warning("%d ranks share %d cores; as many ranks as cores are quicker", self.size, cores)
        # A thread has this lock while it listens to the ranks, but not while the reader of a stream handles an item.
        self._turn = threading.Lock()
        self._ranks: list[RankProcess] = []
        self._call_now: _Call | None = None
        self._closed = False
        _opened.add(self)
        with self._turn:
            self._start()

    @property
    def sees(self) -> bool:
        """Whether prompts may have images."""
        return self.image_words > 0

    # ----------------------------------------------------------------- MetaModel's methods

    def generate(
        self,
        prompts: Sequence[Prompt],
        images: Any = None,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        additional_stop_symbols: Iterable[str] = (),
        seed: int | None = None,
        cancelled: Callable[[], bool] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> list[str]:
        how = sampling_arguments(
            max_gen_len, self._asked.max_seq_len, temperature, top_p, additional_stop_symbols, seed
        )
        return self._answer("generate", {"prompts": prompts, "images": images, **how}, _Watch(cancelled, on_step))

    def stream_generate(
        self,
        prompt: Prompt,
        image: Any = None,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        additional_stop_symbols: Iterable[str] = (),
        seed: int | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[StreamItem]:
        """As `MetaModel.stream_generate`. Closing or dropping the iterator ends the generation on the ranks."""
        how = sampling_arguments(
            max_gen_len, self._asked.max_seq_len, temperature, top_p, additional_stop_symbols, seed
        )
        yield from self._replies("stream_generate", {"prompt": prompt, "image": image, **how}, _Watch(cancelled))

    def compute_logits(
        self, examples: Sequence[Prompt], images: Any = None, bos: bool = True, eos: bool = False
    ) -> list[Tensor]:
        """As `MetaModel.compute_logits`; the logits are on the CPU."""
        return self._answer("compute_logits", {"examples": examples, "images": images, "bos": bos, "eos": eos})

    def evaluate_examples(
        self,
        examples: Sequence[Prompt],
        contexts: Sequence[Prompt] | None = None,
        images: Any = None,
        bos: bool = True,
        eos: bool = False,
    ) -> dict[str, list]:
        """As `MetaModel.evaluate_examples`; the logits are on the CPU."""
        arguments = {"examples": examples, "contexts": contexts, "images": images, "bos": bos, "eos": eos}
        return self._answer("evaluate_examples", arguments)

    def close(self) -> None:
        """End the ranks, also in the middle of another thread's call. A later call starts them again."""
        self._closed = True
        for rank in list(self._ranks):
            rank.kill()
        listened = self._turn.acquire(timeout=GRACE)  # a thread that listens notices their end and releases the lock
        try:
            if self._closed:  # otherwise a later call has started new ranks meanwhile
                self._end()
        finally:
            if listened:
                self._turn.release()

    def __enter__(self) -> MultiGpuWrapper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._end()

    # ----------------------------------------------------------------- calls

    def _answer(self, method: str, arguments: dict[str, Any], watch: _Watch = NOBODY) -> Any:
        replies = self._replies(method, arguments, watch)
        try:
            while True:
                next(replies)
        except StopIteration as end:
            return from_plain(end.value)

    def _replies(self, method: str, arguments: dict[str, Any], watch: _Watch) -> Replies:
        """Send a call to all ranks, yield the first one's items, return its result."""
        call = self._begin(method, arguments, watch)
        try:
            while True:
                with self._turn:
                    while not call.items and not call.over:
                        self._listen(call)
                    if not call.items:
                        return call.outcome()
                    item = call.items.popleft()
                yield item
        finally:
            if not call.over:  # the reader left, or Ctrl-C: end the call on the ranks, or end the ranks
                self._leave(call)

    def _begin(self, method: str, arguments: dict[str, Any], watch: _Watch) -> _Call:
        try:
            message = ForkingPickler.dumps((method, arguments_to_send(arguments)))
        except AccessoryError:
            raise
        except Exception as error:
            raise InputError(f"{method}: got an argument that cannot be sent to other processes ({error})") from error
        while True:
            with self._turn:
                busy = self._call_now
                if busy is None or busy.over:
                    return self._send(method, message, watch)
                self._listen(busy)  # perhaps a half-read stream: its items are stored for its reader
            time.sleep(POLL / 100)  # lets that reader take the lock

    def _send(self, method: str, message: Any, watch: _Watch) -> _Call:
        if not self._ranks:
            self._start()
        call = _Call(method, self._ranks, self._step_timeout, watch)
        try:
            for rank in self._ranks:
                rank.connection.send_bytes(message)
        except OSError as error:
            raise self._lost(self._ranks, method) from error
        except BaseException:  # Ctrl-C: some may have been called, others not
            self._end()
            raise
        self._call_now = call
        return call

    def _listen(self, call: _Call) -> None:
        """Wait a moment for messages of the ranks. If the call fails, set `call.error`, and end ranks out of step."""
        if not call.told and (call.left or (call.watch.cancelled is not None and call.watch.cancelled())):
            call.told = True
            with contextlib.suppress(OSError):  # a rank that is gone is noticed below
                self._ranks[0].connection.send(("cancel", {}))
        try:
            for connection in wait(list(call.waiting), timeout=POLL):
                call.hear(call.waiting[connection])  # type: ignore[index]
        except BaseException as error:
            if not isinstance(error, EOFError | OSError) or isinstance(error, TimeoutError):  # Ctrl-C, an alarm
                if call.hearing:
                    self._end()
                raise
            call.error = self._lost(list(call.waiting.values()), call.doing)
            return
        silent = time.monotonic() - call.heard
        if call.problems and (not call.waiting or silent > GRACE):  # silent: they wait for a rank that has failed
            call.error, in_step = call.failure(self.size)
            if not in_step:
                self._end()
        elif call.waiting and silent > call.patience:
            who = ", ".join(str(rank.number) for rank in call.waiting.values())
            self._end()
            silence = f"ranks {who} said nothing for {call.patience:.0f} s while {call.doing}"
            call.error = RankError(f"{silence}; the next call starts them again")

    def _leave(self, call: _Call) -> None:
        """Cancel the ranks' call and wait until they are in step again. End them if that takes too long."""
        call.left, call.patience, call.heard = True, min(call.patience, GRACE), time.monotonic()
        # A thread that already has the lock listens, and cancels the call itself. It may be this thread, when garbage
        # collection drops a stream while it listens.
        if not self._turn.acquire(timeout=1):
            return
        try:
            while not call.over:
                self._listen(call)
        except BaseException:  # a second Ctrl-C
            self._end()
            raise
        finally:
            self._turn.release()

    def _lost(self, ranks: Sequence[RankProcess], doing: str) -> RankError:
        how = who_ended(ranks, GRACE) or "a rank closed its connection"
        self._end()
        if self._closed:
            return RankError(f"the ranks were closed while {doing}")
        return RankError(f"{how} while {doing}; the next call starts the ranks again")

    # ----------------------------------------------------------------- processes

    def _start(self) -> None:
        """Start ranks and load the model on them. If that fails, end all ranks."""
        self._closed = False
        try:
            host, port = self._meeting
            self._store: Any = host_store(host, port)  # the ranks meet through it, so it must stay alive
            start_processes(RANK_MODULE, self._gpu_ids, host, self._store.port, self._load_timeout, self._ranks)
            loading = _Call("loading", self._ranks, self._load_timeout)
            for rank in self._ranks:
                progress = self._asked.progress and rank.number == 0
                rank.connection.send({**self._asked.to_dict(), "progress": progress})
            while not loading.over:
                self._listen(loading)
            self.image_words: int = loading.outcome()
        except OSError as error:
            raise self._lost(self._ranks, "loading") from error
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        ranks, self._ranks = getattr(self, "_ranks", []), []
        end_processes(ranks)
        self._store = None  # frees its port
        call = getattr(self, "_call_now", None)
        if call is not None and not call.over:
            call.error = RankError(f"the ranks were {'closed' if self._closed else 'ended'} while {call.doing}")


_opened: weakref.WeakSet[MultiGpuWrapper] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for wrapper in list(_opened):
        wrapper.close()
