"""Times loading, decoding, prompts and QLoRA of quantised Mixtral-8x7B at its real size on one 80 GB card.

    python benchmarks/gpu_quant.py [--formats int8 int4 nf4 fp8] [--layers 32] [--qlora nf4 int4]
    python benchmarks/gpu_quant.py --products 32 128 512 1024 2048 4096 8192 [--formats int4 nf4 int8]

The weights are random. They come as a stream of 16-bit tensors, one at a time, as from a checkpoint, and are quantised
on arrival. The floor of a decoded token is the number of bytes that it must read, divided by the card's copy rate,
which is measured in the same run. The floor of a prompt or a QLoRA step is the products' operations (twice forward's
for a frozen base), divided by the measured bf16 matmul rate. `--products` times one layer's three products for so many
(token, expert) pairs in two ways: dequantised tile by tile inside the product, and as a whole before it. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from engine_steps import decode, engine_over, room_for
from gpu_train import forward_flops, matmul_rate, random_batch

from accessory.adapt.peft import adapter_specs_for, trainable_rule
from accessory.build.network import NetworkSpec, TrainingSpec, build
from accessory.checkpoint.folder import Checkpoint
from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.names import expected_shapes
from accessory.config import PRESETS, LlamaType, ModelArgs
from accessory.formats import Format, Quant
from accessory.nn.decoder import Decoder
from accessory.ops.dense_products import sort_by_expert
from accessory.ops.quantized import Packed, quantize
from accessory.ops.quantized_products import dequantized
from accessory.parallel.mesh import DeviceMesh
from accessory.train.trainer import LossWeights, Trainer


class Noise(Lazy):
    """A bf16 tensor of normal numbers, drawn in the tensor that it is copied to. With `norm` it is all ones."""

    def __init__(self, shape: Sequence[int], norm: bool = False) -> None:
        self.shape, self.dtype, self.norm = tuple(shape), torch.bfloat16, norm

    def load(self) -> torch.Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        self._copy_to(out)
        return out

    def _narrow(self, dim: int, start: int, length: int) -> Lazy:
        return Noise((*self.shape[:dim], length, *self.shape[dim + 1 :]), self.norm)

    def _copy_to(self, dst: torch.Tensor) -> None:
        if self.norm:
            dst.fill_(1.0)
        else:
            dst.normal_(0, 0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="8x7b", choices=PRESETS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--implementation", default="sparse")
    parser.add_argument("--formats", nargs="*", default=["int8", "int4", "nf4", "fp8"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generated", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--qlora", nargs="*", default=["nf4"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--products", type=int, nargs="+", metavar="PAIRS")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    options.batch = 1
    args = PRESETS[options.preset]
    args = args.replace(n_layers=options.layers or args.n_layers)
    copy, rate = copy_rate(options.device), matmul_rate(options.device)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}: copy {copy / 1e12:.2f} TB/s, bf16 matmul {rate / 1e12:.0f} TFLOP/s; torch {torch.__version__}\n")
    if options.products:
        return products(args, options.formats, options.products)
    print("| format | what | value | tokens/s | times the floor |\n|---|---|---|---|---|")
    for format in options.formats:
        inference(args, format, options, copy, rate)
        free()
    for format in options.qlora:
        qlora(args, format, options, rate)
        free()


def source(args: ModelArgs) -> Checkpoint:
    """A checkpoint of noise, without files."""
    tensors: dict[str, Lazy] = {n: Noise(s, n.endswith("norm.weight")) for n, s in expected_shapes(args).items()}
    return Checkpoint(
        path=Path("noise"), layout="hf", args=args, llama_type=LlamaType("sparse"), tensors=tensors, files=[]
    )


def inference(args: ModelArgs, format: str, options: argparse.Namespace, copy: float, rate: float) -> None:
    quant = Quant.parse(format)
    assert quant is not None
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    spec = NetworkSpec(checkpoints=[source(args)], args=args, implementation=options.implementation, quant=quant)
    decoder = build(spec, device=options.device)
    torch.cuda.synchronize()
    seconds, resident = time.perf_counter() - began, torch.cuda.memory_allocated() / 1e9
    row(format, "loaded and quantised, s", f"{seconds:.1f}")
    wanted = quant.nbytes(args) / 1e9
    row(format, "resident, GB (the arithmetic)", f"{resident:.2f} ({wanted:.2f})", ratio=resident / wanted)
    row(format, "peak while loading, GB", f"{torch.cuda.max_memory_allocated() / 1e9:.2f}")
    for batch in options.batches:
        decoding(decoder, args, quant, format, batch, options, copy)
    tokens_BT = torch.randint(0, args.vocab_size, (1, options.prefill), device=options.device)
    rows_N = torch.zeros(1, dtype=torch.int64, device=options.device)
    with torch.inference_mode():
        seconds = timed(partial(decoder, tokens_BT, rows_N=rows_N))
    floor = (forward_flops(args, 1, options.prefill) - 2 * args.vocab_size * args.dim * (options.prefill - 1)) / rate
    row(format, f"prompt of {options.prefill}, ms", f"{seconds * 1e3:.1f}", options.prefill / seconds, seconds / floor)


def decoding(
    decoder: Decoder, args: ModelArgs, quant: Quant, format: str, batch: int, options: argparse.Namespace, copy: float
) -> None:
    engine = engine_over(decoder, room_for(batch, options.prompt + options.generated))
    found = decode(engine, args.vocab_size, batch, options.prompt, options.generated, rounds=3)
    seconds, kind = statistics.median(found.seconds), "graph" if found.graph else "eager"
    E, K = args.moe.num_experts, args.moe.num_experts_per_tok
    floor = bytes_read(args, quant, E * (1 - (1 - K / E) ** batch)) / copy
    row(format, f"decode, batch {batch}, {kind}, ms", f"{seconds * 1e3:.2f}", batch / seconds, seconds / floor)
    row(format, f"second token of the first call after, batch {batch}, s", f"{found.ready:.2f}")


def bytes_read(args: ModelArgs, quant: Quant, experts: float) -> float:
    """Bytes of weights that a step reads if it visits `experts` experts of each layer. The embedding is not read."""
    whole, one_less = quant.nbytes(args), quant.nbytes(args.replace(moe={"num_experts": args.moe.num_experts - 1}))
    per_expert = whole - one_less  # in all layers together
    return whole - args.vocab_size * args.dim * 2 - (args.moe.num_experts - experts) * per_expert


def qlora(args: ModelArgs, format: str, options: argparse.Namespace, rate: float) -> None:
    args = args.replace(lora_rank=16, lora_alpha=16.0, norm_tuning=False)
    torch.cuda.reset_peak_memory_stats()
    quant = Quant.parse(format)
    spec = NetworkSpec(checkpoints=[source(args)], args=args, implementation=options.implementation, quant=quant)
    rule = trainable_rule(args, peft=True)
    training = TrainingSpec(trainable=rule, adapters=adapter_specs_for(args), checkpointing=True)
    decoder = build(spec, device=options.device, training=training)
    row(f"QLoRA, {format}", "peak while loading, GB", f"{torch.cuda.max_memory_allocated() / 1e9:.2f}")
    trainer = Trainer(decoder, DeviceMesh(), LossWeights(args.load_balancing_weight), clip=2.0)
    batch = random_batch(args, options)
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: trainer.step([batch], 1e-5), rounds=4, warm=2)
    peak = torch.cuda.max_memory_allocated() / 1e9
    trained = sum(p.numel() for _, p in trainer.named) / 1e6
    row(f"QLoRA, {format}", f"{trained:.0f} million trained, peak, GB", f"{peak:.1f}")
    floor = 2 * forward_flops(args, 1, options.tokens) / rate
    row(
        f"QLoRA, {format}",
        f"step of {options.tokens} tokens, recomputing, ms",
        f"{seconds * 1e3:.0f}",
        options.tokens / seconds,
        seconds / floor,
    )


def products(args: ModelArgs, formats: Sequence[Format], pairs: Sequence[int]) -> None:
    """Print a table: products of w1, w3 and w2, forward and backward, dequantised inside the product and before it."""
    from triton.testing import do_bench

    from accessory.ops.triton import packed_grouped as tiles

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
                    partial(tiles.product, x_NI, p, count_E),
                    partial(dequantized_before, x_NI, p, end_E, transposed=True),
                    partial(tiles.gradient, y_NO, p, count_E),
                    partial(dequantized_before, y_NO, p, end_E, transposed=False),
                )
                for n, way in enumerate(ways):
                    times[n] += often * do_bench(way, return_mode="median")
            print(f"| {N} | {format} | " + " | ".join(f"{t:.2f}" for t in times) + " |", flush=True)


def dequantized_before(a_NR: torch.Tensor, p: Packed, end_E: torch.Tensor, transposed: bool) -> torch.Tensor:
    weight = dequantized(p, a_NR.dtype)
    return F.grouped_mm(a_NR, weight.transpose(1, 2) if transposed else weight, offs=end_E)


def row(format: str, what: str, value: str, rate: float | None = None, ratio: float | None = None) -> None:
    numbers = f"{'–' if rate is None else f'{rate:,.0f}'} | {'–' if ratio is None else f'{ratio:.2f}'}"
    print(f"| {format} | {what} | {value} | {numbers} |", flush=True)


def copy_rate(device: str) -> float:
    n = 2**29 if device == "cuda" else 2**22
    source, target = (torch.randn(n, device=device).to(torch.bfloat16) for _ in range(2))
    return 4 * n / timed(lambda: target.copy_(source))


def timed(function: object, rounds: int = 7, warm: int = 2) -> float:
    times = []
    for n in range(rounds + warm):
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()  # type: ignore[operator]
        torch.cuda.synchronize()
        if n >= warm:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
