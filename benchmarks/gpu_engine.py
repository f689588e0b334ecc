"""Times the engine at Mixtral-8x7B's sizes, with random weights, on one card or on several.

    python benchmarks/gpu_engine.py [--layers 32] [--formats int8 int4] [--batches 1 4 16 64] [--requests 256]
    torchrun --nproc-per-node 2 benchmarks/gpu_engine.py [--formats none int8] [--implementation base]

A step's floor is the bytes that a rank must read (its part of attention, head and of the experts that a batch of
uniformly routed tokens meets, and the keys and values), divided by the card's copy rate, which is measured in the same
run. In base the busiest rank counts: the largest number of its experts that the batch meets, on average. `--requests`
also times so many requests with prompts of 64 to 1,024 tokens and answers of 32 to 512. Prints Markdown.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from engine_steps import decode, random_request, runner_over
from gpu_quant import bytes_read, copy_rate, source

from accessory.build.network import NetworkSpec, build
from accessory.config import PRESETS, ModelArgs
from accessory.engine.engine import Engine
from accessory.engine.executor import Follower, GroupExecutor, LocalExecutor
from accessory.formats import Quant
from accessory.launch.process_group import join_launched
from accessory.parallel.mesh import DeviceMesh, Ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="8x7b", choices=PRESETS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--implementation", nargs="+", default=["sparse"])
    parser.add_argument("--formats", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--cache", type=int, default=2**17, metavar="TOKENS")
    parser.add_argument("--requests", type=int, default=0)
    options = parser.parse_args()
    args = PRESETS[options.preset]
    args = args.replace(n_layers=options.layers or args.n_layers)
    group = join_launched()
    ranks = Ranks.of(group) if group is not None else None
    first, size = ranks is None or ranks.rank == 0, 1 if ranks is None else ranks.size
    copy = copy_rate("cuda")
    if first:
        print(f"{size} × {torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s; torch {torch.__version__}; "
              f"{args.n_layers} layers\n")  # fmt: skip
        print("| format | what | ms | tokens/s | times the floor |\n|---|---|---|---|---|", flush=True)
    for implementation in options.implementation:
        for format in options.formats:
            quant = Quant.parse(format) if format != "none" else None
            spec = NetworkSpec(checkpoints=[source(args)], args=args, implementation=implementation, quant=quant)
            decoder = build(spec, DeviceMesh(model=ranks), device="cuda", dtype=torch.bfloat16)
            runner = runner_over(decoder, options.cache, ranks=ranks)
            if first:
                executor = LocalExecutor(runner) if ranks is None else GroupExecutor(runner, ranks)
                measure(
                    Engine.of(executor, runner.about), f"{implementation} {format}", args, quant, size, copy, options
                )
                if isinstance(executor, GroupExecutor):
                    executor.end_call()
            else:
                assert ranks is not None
                for _ in Follower(runner, ranks).follow():
                    pass
            executor = runner = decoder = None  # the next format needs the memory
            gc.collect()
            torch.cuda.empty_cache()
    if group is not None:
        dist.barrier()


def measure(
    engine: Engine, name: str, args: ModelArgs, quant: Quant | None, ranks: int, copy: float, options: Any
) -> None:
    for batch in options.batches:
        seconds = statistics.median(decode(engine, args.vocab_size, batch, options.prompt, options.tokens).seconds)
        floor = step_bytes(args, quant, batch, ranks, "base" in name, options.prompt + options.tokens / 2) / copy
        numbers = f"{seconds * 1e3:.2f} | {batch / seconds:.0f} | {seconds / floor:.2f}"
        print(f"| {name} | decode, batch {batch} | {numbers} |", flush=True)
    if options.requests:
        throughput(engine, name, args, quant, ranks, copy, options)


def step_bytes(args: ModelArgs, quant: Quant | None, batch: int, ranks: int, base: bool, context: float) -> float:
    """Bytes that a rank reads in a step."""
    E, K = args.moe.num_experts, args.moe.num_experts_per_tok
    met = E * (1 - (1 - K / E) ** batch)
    whole = bytes_read(args, quant or Quant(), met)
    experts = whole - bytes_read(args, quant or Quant(), 0)
    busiest = busiest_share(E, K, batch, ranks) if base else met / ranks
    keys = 2 * 2 * args.n_layers * args.n_kv_heads * args.head_dim * context * batch
    return (whole - experts + keys) / ranks + experts * busiest / met


def busiest_share(E: int, K: int, batch: int, ranks: int) -> float:
    """The largest number of experts that a rank of `ranks` has met, on average over random routings."""
    r, total = random.Random(0), 0
    for _ in range(2000):
        met = {e for _ in range(batch) for e in r.sample(range(E), K)}
        total += max(sum(e * ranks // E == rank for e in met) for rank in range(ranks))
    return total / 2000


def throughput(
    engine: Engine, name: str, args: ModelArgs, quant: Quant | None, ranks: int, copy: float, options: Any
) -> None:
    r = random.Random(0)
    requests = []
    for _ in range(options.requests):
        requests.append(random_request(r, args.vocab_size, r.randint(64, 1024), r.randint(32, 512)))
    began, steps = time.perf_counter(), []
    for request in requests:
        engine.add(request)
    last = began
    while engine.step():
        now = time.perf_counter()
        steps.append((now - last, len(engine.scheduler.running), sum(len(s.ids) for s in engine.scheduler.running)))
        last = now
    seconds = time.perf_counter() - began
    answers = sum(s.answer_length for s in requests)
    print(f"| {name} | {options.requests} requests, {sum(s.prompt_length for s in requests)} + {answers} tokens | "
          f"{seconds * 1e3:.0f} | {answers / seconds:.0f} | – |", flush=True)  # fmt: skip
    near = [(t, keys) for t, running, keys in steps if 56 <= running <= 72]
    if near:
        step, context = statistics.median(t for t, _ in near), statistics.median(k / 64 for _, k in near)
        floor = step_bytes(args, quant, 64, ranks, "base" in name, context) / copy
        print(f"| {name} | a step with 56 to 72 running | {step * 1e3:.2f} | – | {step / floor:.2f} |", flush=True)
    print(f"| {name} | put back {engine.scheduler.counts.put_back} times | – | – | – |", flush=True)


if __name__ == "__main__":
    main()
