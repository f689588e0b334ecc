"""Measures one model on several ranks of one CPU (gloo): time, processor time and communication per token.

    python benchmarks/ranks_cpu.py demo-model

`demo-model` is the folder that `make demo` leaves. The ranks share the cores. Prints Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PROMPT = [504, 3575, 282, 4649, 314]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    print("| implementation | ranks | ms/token | processor ms/token, all ranks | sums a layer | same text |")
    print("|---|---|---|---|---|---|")
    for kind in ("base", "sparse"):
        texts: list[list[int]] = []
        for size in options.ranks:
            context = mp.get_context("spawn")
            queue = context.Queue()
            with tempfile.TemporaryDirectory() as scratch:
                store = os.path.join(scratch, "store")
                args = (size, store, str(options.folder / kind), options.dtype, options.tokens, queue)
                workers = mp.spawn(measure, args=args, nprocs=size, join=False)
                found = [queue.get() for _ in range(size)]
                workers.join()
            texts.append(found[0]["ids"])
            wall = statistics.median(found[0]["steps"]) * 1e3
            processor = sum(f["processor"] for f in found) * 1e3
            sums = found[0]["sums"]
            print(
                f"| {kind} | {size} | {wall:.1f} | {processor:.1f} | {sums:g} | {texts[0] == texts[-1]} |",
                flush=True,
            )


def measure(rank: int, size: int, store: str, folder: str, dtype: str, tokens: int, queue: Any) -> None:
    from accessory.engine.sampling_params import SamplingParams
    from accessory.model.meta import MetaModel
    from accessory.nn.attention import Attention
    from accessory.nn.experts import StackedExperts

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    group = dist.new_group(list(range(size)))
    model = MetaModel.from_pretrained(folder, mp_group=group, dtype=getattr(torch, dtype), device="cpu")
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for module in model.modules():  # sums come after attention and after the experts
        if size > 1 and isinstance(module, Attention | StackedExperts) and module._forward_hooks:
            module.register_forward_hook(count)
    params, stamps = SamplingParams(ignore_eos=True), list[float]()

    def run(n: int) -> tuple[list[int], float, int]:
        """The answer's tokens, and the processor seconds and sums that it took on this rank."""
        stamps.clear()
        began, before = time.process_time(), calls
        how = {"max_gen_len": n, "params": params, "on_step": lambda _: stamps.append(time.perf_counter())}
        (answer,) = model.complete([PROMPT], **how)
        return answer.token_ids, time.process_time() - began, calls - before

    run(tokens)  # warms up
    _, first, first_sums = run(1)
    ids, processor, sums = run(tokens)
    n = tokens - 1
    queue.put(
        {
            "ids": ids,
            "steps": [b - a for a, b in itertools.pairwise(stamps)],
            "processor": (processor - first) / n,
            "sums": (sums - first_sums) / n / model.args.n_layers,
        }
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
