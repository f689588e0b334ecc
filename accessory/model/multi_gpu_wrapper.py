"""`MultiGpuWrapper`: one process drives a model that lives on several ranks, each a process of its own.

The driver and each rank talk over a local socket, whose end tells either that the other died. A call goes to all ranks;
the first one answers, all say when they are done, so the next call finds them in step. When a rank dies or is stuck,
all are ended and the next call starts new ones.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from accessory.checkpoint.hub import resolve
from accessory.data.tokenizer import Tokenizer, load_tokenizer
from accessory.errors import InputError, RankError
from accessory.model.meta import PathLike, Prompt, StreamItem, tokenizer_of

GRACE = 5.0  # seconds that ranks get to end a call that was cancelled, or to say that they failed as another did
POLL = 0.1

Replies = Generator[Any, None, Any]


class MultiGpuWrapper:
    """A model on `gpus` ranks, or on the GPUs `gpu_ids`, with `MetaModel`'s methods; without CUDA, or with
    device="cpu", they share the CPU.

    The other arguments are those of `MetaModel.from_pretrained`. `master_addr` and `master_port` say where the ranks
    meet; by default on a free port of this machine. `load_timeout` and `step_timeout` (seconds) bound how long the
    ranks may say nothing. Calls from several threads are done one after the other. Use it as a context manager, or
    `close` it; the end of this process closes it as well.

    Raises what `MetaModel` raises for wrong input, and RankError when ranks die, hang or fail.
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
        on_gpus = torch.cuda.is_available() and str(from_pretrained.get("device") or "cuda") != "cpu"
        self.size = _check_gpus(gpus, gpu_ids, on_gpus)
        self._gpu_ids = (list(gpu_ids) if gpu_ids is not None else list(range(self.size))) if on_gpus else None
        self._meeting = (master_addr or "127.0.0.1", master_port or 0)
        self._load_timeout, self._step_timeout = load_timeout, step_timeout
        self._options = {"pretrained_path": pretrained_path, **from_pretrained}
        given = [pretrained_path] if isinstance(pretrained_path, str | Path) else list(pretrained_path)
        own = from_pretrained.get("tokenizer_path")
        self.tokenizer: Tokenizer = load_tokenizer(own) if own else tokenizer_of([Path(resolve(p)) for p in given])
        self._turn = threading.Lock()
        self._ranks: list[_Rank] = []
        self._in_step = True  # no rank is in the middle of anything
        atexit.register(self.close)
        with self._turn:
            self._start()

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
    ) -> list[str]:
        how = _sampling(max_gen_len, temperature, top_p, additional_stop_symbols, seed)
        return self._call("generate", {"prompts": prompts, "images": images, **how}, cancelled)

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
        """As `MetaModel.stream_generate`; closing the iterator, or dropping it, ends the generation on the ranks."""
        how = _sampling(max_gen_len, temperature, top_p, additional_stop_symbols, seed)
        with self._turn:
            yield from self._run("stream_generate", {"prompt": prompt, "image": image, **how}, cancelled)

    def compute_logits(
        self, examples: Sequence[Prompt], images: Any = None, bos: bool = True, eos: bool = False
    ) -> list[Tensor]:
        """As `MetaModel.compute_logits`; the logits are on the CPU."""
        return self._call("compute_logits", {"examples": examples, "images": images, "bos": bos, "eos": eos})

    def evaluate_examples(
        self,
        examples: Sequence[Prompt],
        contexts: Sequence[Prompt] | None = None,
        images: Any = None,
        bos: bool = True,
        eos: bool = False,
    ) -> dict[str, list]:
        arguments = {"examples": examples, "contexts": contexts, "images": images, "bos": bos, "eos": eos}
        return self._call("evaluate_examples", arguments)

    def close(self) -> None:
        """End the ranks; a later call would start them again."""
        atexit.unregister(self.close)
        self._end()

    def __enter__(self) -> MultiGpuWrapper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._end()

    # ----------------------------------------------------------------- calls

    def _call(self, method: str, arguments: dict[str, Any], cancelled: Callable[[], bool] | None = None) -> Any:
        with self._turn:
            calling = self._run(method, arguments, cancelled)
            try:
                while True:
                    next(calling)
            except StopIteration as end:
                return from_plain(end.value)

    def _run(self, method: str, arguments: dict[str, Any], cancelled: Callable[[], bool] | None) -> Replies:
        """Send a call to all ranks, yield the first one's items, return its result."""
        if not self._ranks:
            self._start()
        try:
            for rank in self._ranks:
                rank.connection.send((method, dict(arguments)))
        except OSError as error:
            raise self._lost(self._ranks, method) from error
        try:
            return (yield from self._replies(method, self._step_timeout, cancelled))
        finally:
            if self._ranks and not self._in_step:  # the caller left, or Ctrl-C: end it on the ranks, or end the ranks
                self._drain()

    def _replies(
        self, doing: str, patience: float, cancelled: Callable[[], bool] | None = None, raising: bool = True
    ) -> Replies:
        """Listen until every rank has said how it went; RankError when one dies, fails alone or stays silent."""
        self._in_step = False
        waiting = {rank.connection: rank for rank in self._ranks}
        result: Any = None
        problems: dict[int, tuple[Any, ...]] = {}
        heard, told = time.monotonic(), False
        while waiting:
            ready = wait(list(waiting), timeout=POLL)
            if cancelled is not None and not told and cancelled():
                self._ranks[0].connection.send(("cancel", {}))
                told = True
            for connection in ready:
                rank, heard = waiting[connection], time.monotonic()  # type: ignore[index]
                try:
                    kind, *said = rank.connection.recv()
                except (EOFError, OSError) as error:
                    raise self._lost([rank], doing) from error
                if kind == "item":
                    yield said[0]
                    continue
                del waiting[rank.connection]
                if kind == "done":
                    result = said[0] if rank.number == 0 else result
                else:
                    problems[rank.number] = (kind, *said)
            silent = time.monotonic() - heard
            if problems and silent > GRACE:
                break  # the others wait for one that has failed
            if silent > patience:
                self._end()
                raise RankError(f"ranks {_numbers(waiting.values())} said nothing for {patience:.0f} s while {doing}")
        self._in_step = not waiting
        if problems and raising:
            self._raise(problems, doing)
        return result

    def _raise(self, problems: dict[int, tuple[Any, ...]], doing: str) -> None:
        number, (kind, what, *trace) = min(problems.items())
        everywhere = self._in_step and len(problems) == self.size
        if not everywhere or doing == "loading":
            self._end()
        if kind == "refused":
            if everywhere:
                raise what
            raise RankError(f"rank {number}, while {doing}: {what}")
        raise RankError(f"rank {number} failed while {doing}: {what}") from Exception("".join(trace))

    def _drain(self) -> None:
        """Cancel what the ranks are doing and wait until they are in step again; end them if that takes long."""
        try:
            self._ranks[0].connection.send(("cancel", {}))
            for _ in self._replies("cancelling", GRACE, raising=False):
                pass
        except (RankError, OSError):
            self._end()
        except BaseException:  # a second Ctrl-C
            self._end()
            raise

    def _lost(self, ranks: Sequence[_Rank], doing: str) -> RankError:
        deadline = time.monotonic() + GRACE
        while not (dead := [r for r in ranks if r.ended(0)]) and time.monotonic() < deadline:
            time.sleep(POLL / 10)
        how = ", ".join(r.how_it_ended() for r in dead) or f"rank {_numbers(ranks)} closed its connection"
        self._end()
        return RankError(f"{how} while {doing}; the next call starts the ranks again")

    # ----------------------------------------------------------------- processes

    def _start(self) -> None:
        self._store = _store(*self._meeting)  # kept: the ranks meet in it
        authkey = secrets.token_bytes(32)
        with tempfile.TemporaryDirectory(prefix="accessory-") as folder:
            address = os.path.join(folder, "driver")
            with Listener(address, family="AF_UNIX", backlog=self.size, authkey=authkey) as listener:
                where = {"address": address, "authkey": authkey.hex(), "size": self.size}
                where |= {"host": self._meeting[0], "port": self._store.port}
                try:
                    self._ranks = [
                        _Rank(n, self._gpu_ids[n] if self._gpu_ids else None, where) for n in range(self.size)
                    ]
                    self._accept(listener)
                    for rank in self._ranks:
                        rank.connection.send({**self._options, "progress": self._progress(rank.number)})
                    for _ in self._replies("loading", self._load_timeout):
                        pass
                except BaseException:
                    self._end()
                    raise

    def _progress(self, number: int) -> bool:
        return bool(self._options.get("progress")) and number == 0

    def _accept(self, listener: Listener) -> None:
        """A connection from every rank; a process that dies before it connects must not be waited for."""
        connections: dict[int, Connection] = {}

        def accept() -> None:
            with contextlib.suppress(OSError, EOFError):
                while len(connections) < self.size:
                    connection = listener.accept()
                    connections[connection.recv()] = connection

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL)
            dead = [r for r in self._ranks if r.ended(0)]
            if dead:
                raise RankError(f"{dead[0].how_it_ended()} before it could load")
        for rank in self._ranks:
            rank.connection = connections[rank.number]

    def _end(self) -> None:
        ranks, self._ranks = getattr(self, "_ranks", []), []
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.ended(GRACE)


class _Rank:
    """A rank's process; `connection` is there once it has called back."""

    connection: Connection

    def __init__(self, number: int, gpu: int | None, where: dict[str, Any]) -> None:
        self.number = number
        package = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
        if gpu is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "accessory.model.rank_process"],
            stdin=subprocess.PIPE,
            # Only the first rank speaks to people.
            stdout=None if number == 0 else subprocess.DEVNULL,
            stderr=None if number == 0 else subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is for the driver alone
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({**where, "rank": number}).encode() + b"\n")
            self._process.stdin.flush()  # and kept open: its end tells the rank that the driver is gone

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        for end in (getattr(self, "connection", None), self._process.stdin):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.close()

    def ended(self, patience: float) -> bool:
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            return False
        return True

    def how_it_ended(self) -> str:
        code = self._process.returncode
        return f"rank {self.number} was ended by signal {-code}" if code < 0 else f"rank {self.number} ended ({code})"


def _store(host: str, port: int) -> Any:
    try:
        return dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
    except (dist.DistNetworkError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if "in use" in reason or "EADDRINUSE" in reason:
            reason = "is in use; give another one, or leave it out for a free one"
        raise InputError(f"master_port: {port} on {host} {reason}") from error


def _check_gpus(gpus: int | None, gpu_ids: Sequence[int] | None, on_gpus: bool) -> int:
    if gpu_ids is not None:
        if not gpu_ids or len(set(gpu_ids)) < len(gpu_ids):
            raise InputError(f"gpu_ids: got {list(gpu_ids)}, but they must be different numbers, at least one")
        if gpus is not None and gpus != len(gpu_ids):
            raise InputError(f"gpus: got {gpus}, but gpu_ids names {len(gpu_ids)}; give one of the two")
    size = len(gpu_ids) if gpu_ids is not None else gpus
    if not isinstance(size, int) or size < 1:
        raise InputError(f"gpus: got {gpus!r}, but it must be a whole number of at least 1")
    last = max(gpu_ids) if gpu_ids is not None else size - 1
    if on_gpus and last >= torch.cuda.device_count():
        raise InputError(f"gpus: GPU {last} is asked for, but this machine shows {torch.cuda.device_count()}")
    return size


def _sampling(max_gen_len: int, temperature: float, top_p: float, stops: Iterable[str], seed: Any) -> dict[str, Any]:
    return {
        "max_gen_len": max_gen_len,
        "temperature": temperature,
        "top_p": top_p,
        "additional_stop_symbols": stops if isinstance(stops, str) else list(stops),
        # A draw of our own where none is given, so that torch.manual_seed in this process makes ranks repeat.
        "seed": int(torch.randint(2**62, ())) if seed is None and temperature else seed,
    }


def _numbers(ranks: Iterable[_Rank]) -> str:
    return ", ".join(str(r.number) for r in ranks)


def from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: from_plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
