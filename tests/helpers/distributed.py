"""Real processes that form a gloo group, run one function and return its results."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def rank_context() -> Any:
    """Makes processes by forking a server that has imported torch once; in each process the import takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accessory.train.run", "accessory.parallel.sharded", "torch._dynamo"])
    return context


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 120, grouped: bool = True
) -> list[Any]:
    """Runs `function(rank, world, *args)` on every rank of a gloo group; returns the results in order of rank.

    grouped: False where the function itself joins the group.
    Fails with the ranks' tracebacks. Ignores how a process ends after it has returned its result, because gloo
    sometimes aborts at interpreter exit.
    """
    context = rank_context()
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        alike = world, store if grouped else None, queue, args
        ranks = [context.Process(target=_main, args=(function, r, *alike)) for r in range(world)]
        for process in ranks:
            process.start()
        try:
            results: dict[int, Any] = {}
            failures = []
            for _ in range(world):
                rank, result, failure = queue.get(timeout=timeout)
                results[rank] = None if failure else pickle.loads(result)
                if failure:
                    failures.append(f"rank {rank}:\n{failure}")
                    break  # the other ranks may wait for this one for ever
            assert not failures, "\n".join(failures)
            return [results[r] for r in range(world)]
        finally:
            for process in ranks:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _main(
    function: Callable[..., Any], rank: int, world: int, store: str | None, queue: Any, args: tuple[Any, ...]
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        timeout = timedelta(seconds=60)
        if store is not None:
            dist.init_process_group(
                "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timeout
            )
        result = function(rank, world, *args)
        if dist.is_initialized():
            dist.barrier()
        # Pickled here: a queue would share tensors through this process, which may end before they are read.
        queue.put((rank, pickle.dumps(result), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        queue.close()
        queue.join_thread()
        if dist.is_initialized():
            dist.destroy_process_group()
