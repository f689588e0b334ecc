"""Times what two limits of `accessory/limits.py` choose between, at Mixtral-8x7B's sizes on one card.

    python benchmarks/gpu_choices.py --products 32 128 512 1024 2048 4096 8192 [--formats int4 nf4 int8]
    python benchmarks/gpu_choices.py --adapters 1 4 16 [--rows 2 8 16 32 64 128 512 2048]

`--products` times one layer's three products for so many (token, expert) pairs in two ways: dequantised tile by tile
inside the product, and as a whole before it. `--adapters` times LoRA of rank 16 for rows of which each names its
adapter, row by row and grouped. Weights are random. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

from accessory.config import PRESETS, ModelArgs
from accessory.formats import Format
from accessory.ops.dense_products import sort_by_expert
from accessory.ops.linear import AdapterRows
from accessory.ops.quantized import Packed, quantize
from accessory.ops.quantized_products import dequantized
from accessory.ops.triton import packed_grouped
from accessory.ops.triton.low_rank import add_grouped, add_row_by_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=["int4", "nf4", "int8"])
    parser.add_argument("--products", type=int, nargs="+", metavar="PAIRS", default=[])
    parser.add_argument("--adapters", type=int, nargs="+", metavar="A", default=[])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8, 16, 32, 64, 128, 512, 2048])
    options = parser.parse_args()
    args = PRESETS["8x7b"]
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}\n")
    if options.products:
        products(args, options.formats, options.products)
    if options.adapters:
        adapters(args.dim, args.hidden_dim, options)


def products(args: ModelArgs, formats: Sequence[Format], pairs: Sequence[int]) -> None:
    """Print a table: products of w1, w3 and w2, forward and backward, dequantised inside the product and before it."""
    E, K = args.moe.num_experts, args.moe.num_experts_per_tok
    print("| pairs | format | forward, inside, ms | before, ms | backward, inside, ms | before, ms |")
    print("|---|---|---|---|---|---|")
    for format in formats:
        up, down = (
            quantize(torch.randn(E, *s, dtype=torch.bfloat16, device="cuda"), format)
            for s in ((args.hidden_dim, args.dim), (args.dim, args.hidden_dim))
        )
        for N in pairs:
            expert_TK = torch.rand(N // K, E, device="cuda").topk(K)[1]
            _, count_E = sort_by_expert(expert_TK, E)
            end_E = count_E.cumsum(0).to(torch.int32)
            times = [0.0] * 4
            for p, often in ((up, 2), (down, 1)):
                x_NI = torch.randn(N, p.shape[2], dtype=torch.bfloat16, device="cuda")
                y_NO = torch.randn(N, p.shape[1], dtype=torch.bfloat16, device="cuda")
                ways = (
                    partial(packed_grouped.product, x_NI, p, count_E),
                    partial(dequantized_before, x_NI, p, end_E, transposed=True),
                    partial(packed_grouped.gradient, y_NO, p, count_E),
                    partial(dequantized_before, y_NO, p, end_E, transposed=False),
                )
                for n, way in enumerate(ways):
                    times[n] += often * do_bench(way, return_mode="median")
            print(f"| {N} | {format} | " + " | ".join(f"{t:.2f}" for t in times) + " |", flush=True)


def dequantized_before(a_NR: Tensor, p: Packed, end_E: Tensor, transposed: bool) -> Tensor:
    weight = dequantized(p, a_NR.dtype)
    return F.grouped_mm(a_NR, weight.transpose(1, 2) if transposed else weight, offs=end_E)


def adapters(D: int, H: int, options: argparse.Namespace) -> None:
    print("| out × in | adapters | rows | row by row, µs | grouped, µs |\n|---|---|---|---|---|")
    for O, I, experts in ((D, D, 1), (H, D, 8)):  # noqa: E741
        for A in options.adapters:
            S = A * experts
            a, b = (torch.randn(S, *s, device="cuda", dtype=torch.bfloat16) for s in ((16, I), (O, 16)))
            scale = torch.ones(A, device="cuda")
            for N in options.rows:
                x, y = (torch.randn(N, n, device="cuda", dtype=torch.bfloat16) for n in (I, O))
                rows = AdapterRows(torch.randint(0, S, (N,), device="cuda"), S)
                _ = rows.sorted  # once a step or layer, for all its products
                times = [timed(partial(way, y, x, a, b, scale, rows)) for way in (add_row_by_row, add_grouped)]
                print(f"| {O} × {I} | {A} | {N} | {times[0]:.1f} | {times[1]:.1f} |", flush=True)


def timed(call: Callable[[], Tensor]) -> float:
    """µs."""
    return do_bench_cudagraph(call, rep=20, return_mode="median") * 1e3


if __name__ == "__main__":
    main()
