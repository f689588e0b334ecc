"""Times the grouped products of dense experts on one card: torch's, and Triton's kernel with several tiles.

    python benchmarks/gpu_grouped.py [--dtypes bfloat16 float16 float32] [--rows 2 8 16 32 64 128 512 2048]
    python benchmarks/gpu_grouped.py --adapters 1 4 16

The weights are random, of Mixtral-8x7B's sizes: up (w1, w3) and down (w2), whole and cut in two along the hidden
dimension. Rows are (token, expert) pairs of a random routing. The floor is the bytes of the experts that got rows,
divided by the card's copy rate, which is measured in the same run. Calls are captured in a CUDA graph, so the time is
the card's and not the host's. `--adapters` times LoRA of rank 16 for rows of which each names its adapter, row by row
and grouped. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from gpu_quant import copy_rate
from torch import Tensor
from triton.testing import do_bench_cudagraph

from accessory.config import PRESETS
from accessory.ops.dense_products import grouped_mm, sort_by_expert
from accessory.ops.linear import AdapterRows
from accessory.ops.triton.grouped import product, tile_of
from accessory.ops.triton.low_rank import add_grouped, add_row_by_row

# (M, P, R, SIDE, SWAP, warps, stages), as in the tables of `ops.triton.grouped`.
TILES_16_BITS = (
    (16, 32, 256, 1, False, 4, 4), (16, 64, 128, 1, False, 4, 4), (16, 64, 128, 1, True, 4, 4),
    (16, 64, 256, 1, True, 4, 3), (16, 128, 64, 1, True, 4, 5), (16, 128, 128, 1, True, 8, 4),
    (32, 64, 128, 1, True, 4, 4), (32, 128, 64, 1, True, 4, 5), (64, 64, 128, 1, False, 4, 4),
    (64, 128, 64, 1, False, 4, 4), (64, 256, 64, 4, False, 8, 3), (128, 128, 64, 8, False, 8, 3),
    (128, 256, 64, 8, False, 8, 3),
)  # fmt: skip
TILES_32_BITS = (
    (16, 32, 32, 1, False, 4, 4), (16, 64, 32, 1, False, 4, 4), (16, 64, 64, 1, False, 8, 3),
    (32, 64, 16, 1, False, 4, 4), (64, 64, 16, 4, False, 8, 3), (64, 128, 16, 4, False, 8, 3),
    (128, 128, 16, 4, False, 8, 3),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8, 16, 32, 64, 128, 512, 2048])
    parser.add_argument("--best", type=int, default=3, help="how many of the quickest tiles are shown")
    parser.add_argument("--adapters", type=int, nargs="+", metavar="A")
    options = parser.parse_args()
    rate = copy_rate("cuda")
    print(f"{torch.cuda.get_device_name()}: copy {rate / 1e12:.2f} TB/s; torch {torch.__version__}\n")
    args = PRESETS["8x7b"]
    if options.adapters:
        return adapters(args.dim, args.hidden_dim, options)
    E, D, F = args.moe.num_experts, args.dim, args.hidden_dim
    print("| dtype | out × in | rows | experts met | what | µs | times the floor |\n|---|---|---|---|---|---|---|")
    for name in options.dtypes:
        for O, I in ((F, D), (D, F), (F // 2, D), (D, F // 2)):  # noqa: E741
            weight = torch.randn(E, O, I, device="cuda").mul_(0.02).to(getattr(torch, name))
            for N in options.rows:
                products(weight, N, rate, options.best)


def products(weight_EOI: Tensor, N: int, rate: float, best: int) -> None:
    E, O, I = weight_EOI.shape  # noqa: E741
    expert_TK = torch.rand(N // 2, E, device="cuda").topk(2)[1]
    _, count_E = sort_by_expert(expert_TK, E)
    met = int((count_E > 0).sum())
    x_NI = torch.randn(N, I, device="cuda").to(weight_EOI.dtype)
    floor = met * O * I * weight_EOI.element_size() / rate * 1e6

    def show(what: str, us: float) -> None:
        kind = str(weight_EOI.dtype).removeprefix("torch.")
        print(f"| {kind} | {O} × {I} | {N} | {met} | {what} | {us:.1f} | {us / floor:.2f} |", flush=True)

    if weight_EOI.dtype == torch.bfloat16:
        show("grouped_mm", timed(partial(grouped_mm, x_NI, weight_EOI, count_E)))
    show("the kernel's own tile", timed(partial(product, x_NI, weight_EOI, count_E)))
    times = []
    for sizes in TILES_32_BITS if weight_EOI.dtype == torch.float32 else TILES_16_BITS:
        call = partial(product, x_NI, weight_EOI, count_E, tile=tile_of(sizes, O, I))
        try:
            times.append((timed(call), sizes))
        except Exception as error:  # a tile may need more shared memory than the card has
            print(f"<!-- {sizes}: {type(error).__name__} -->", flush=True)
    for us, sizes in sorted(times)[:best]:
        show(str(sizes), us)


def adapters(D: int, F: int, options: argparse.Namespace) -> None:
    print("| out × in | adapters | rows | row by row, µs | grouped, µs |\n|---|---|---|---|---|")
    for O, I, experts in ((D, D, 1), (F, D, 8)):  # noqa: E741
        for A in options.adapters:
            S = A * experts
            a, b = (torch.randn(S, *s, device="cuda", dtype=torch.bfloat16) for s in ((16, I), (O, 16)))
            scale = torch.ones(A, device="cuda")
            for N in options.rows:
                x, y = (torch.randn(N, n, device="cuda", dtype=torch.bfloat16) for n in (I, O))
                number = torch.randint(0, S, (N,), device="cuda")
                rows = AdapterRows(number, S)
                _ = rows.sorted  # once a step or layer, for all its products
                times = [timed(partial(way, y, x, a, b, scale, rows)) for way in (add_row_by_row, add_grouped)]
                print(f"| {O} × {I} | {A} | {N} | {times[0]:.1f} | {times[1]:.1f} |", flush=True)


def timed(call: Callable[[], Tensor]) -> float:
    """µs. Weights are larger than the card's cache, so each call reads them anew."""
    return do_bench_cudagraph(call, rep=20, return_mode="median") * 1e3


if __name__ == "__main__":
    main()
