"""Finetuning runs as real processes, one for each rank."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.distributed import rank_context
from helpers.runs import without_charts


@dataclass
class Started:
    """The processes of one run, one for each rank, and the files of their output."""

    processes: list[Any]
    logs: list[Path]

    def wait(self, timeout: float = 120) -> list[int]:
        """Returns the exit statuses (-9: killed). The test fails if a process has not ended after `timeout` seconds."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, p in enumerate(self.processes) if p.exitcode is None]
        self.kill()
        assert not hanging, f"ranks {hanging} hang: {[self.said(rank) for rank in hanging]}"
        return [p.exitcode for p in self.processes]

    def running(self) -> bool:
        return all(p.exitcode is None for p in self.processes)

    def kill(self, number: int = signal.SIGKILL) -> None:
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)
        if number == signal.SIGKILL:
            for process in self.processes:
                process.join()

    def said(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(encoding="utf-8") if self.logs[rank].exists() else ""

    def errors(self) -> list[str]:
        """The lines with "error" in the output of all ranks."""
        return [line for rank in range(len(self.logs)) for line in self.said(rank).splitlines() if "error" in line]


def start(
    fields: dict[str, Any],
    *,
    ranks: int = 1,
    prepare: Callable[..., None] | None = None,
    arguments: Any = (),
    logs: Path | None = None,
) -> Started:
    """Carry a run out as the command does, on `ranks` gloo ranks with torchrun's variables.

    Each process first calls `prepare(rank, *arguments)`, which arranges the fault that the process shall have.
    """
    context = rank_context()
    logs = logs or Path(fields["output_dir"] + ".logs")
    logs.mkdir(parents=True, exist_ok=True)
    environment = {}
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    files = [logs / f"{len(list(logs.iterdir()))}-rank{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank, file in enumerate(files):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        process = context.Process(target=_carry_out, args=(fields, own, str(file), rank, prepare, arguments))
        process.start()
        processes.append(process)
    return Started(processes, files)


def _carry_out(
    fields: dict[str, Any], environment: dict[str, str], log: str, rank: int, prepare: Any, arguments: Any
) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    os.environ.update(environment, OMP_NUM_THREADS="1")
    import torch

    from accessory.commands import outcome
    from accessory.commands.finetune import carry_out
    from accessory.train.config import FinetuneConfig

    outcome.FIRST_SPEAKS = 0  # no launcher ends these ranks when one of them is gone
    torch.set_num_threads(1)
    if prepare is not None:
        prepare(rank, *arguments)
    with without_charts():
        status = outcome.outcome(lambda: carry_out(FinetuneConfig(**fields)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # gloo sometimes aborts at interpreter exit
