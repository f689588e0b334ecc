"""Compares the memory that `accessory plan` predicts with measurements on one card, for layers of real size.

    python benchmarks/plan_check.py [--layers 2] [--seconds 115]

Weights are random. The cases are full training, LoRA and QLoRA, with and without recomputing, in both implementations,
at two numbers of tokens; prompts and decoding, in bf16 and quantised, at two contexts; quantising while loading. The
measurement is torch's max_memory_allocated. It leaves out CUDA's context and holes in the allocator, which are printed
below the table. A case that fails is a line of the table. No case begins after `--seconds`. Prints Markdown.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accessory.adapt.peft import adapter_specs_for, add_adapters, trainable_rule
from accessory.adapt.quant import quantize_skeleton
from accessory.bench.engines import engine_over, random_request, room_for
from accessory.bench.job import noise
from accessory.config import PRESETS, Implementation, ModelArgs
from accessory.data.batches import Batch
from accessory.formats import Quant
from accessory.nn.decoder import Decoder
from accessory.parallel.mesh import DeviceMesh
from accessory.planner.peak import CONTEXT, FRAGMENTATION, QUANTIZING, WORKSPACE, estimate
from accessory.planner.setup import Inference, Setup, Training
from accessory.train.trainer import LossWeights, Trainer

GENERATED = 48


@dataclass(frozen=True)
class Case:
    name: str
    predict: Callable[[], tuple[int, str]]  # bytes, and the name of the moment that takes them
    run: Callable[[], Any]  # its result stays alive until the peak has been read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="8x7b", choices=PRESETS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="of a training step")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--seconds", type=float, default=115)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    began = time.perf_counter()
    args = PRESETS[options.preset].replace(n_layers=options.layers, max_seq_len=65536)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}; torch {torch.__version__}; {options.layers} layers of {options.preset}\n")
    print("| what | predicted, GB | measured, GB | predicted / measured | reserved / allocated | predicted moment |")
    print("|---|---|---|---|---|---|")
    ratios, left = [], 0
    for case in cases(args, options):
        if time.perf_counter() - began > options.seconds:
            left += 1
            continue
        ratio = measure(case, options.device)
        ratios += [ratio] if ratio is not None else []
    if ratios:
        within = sum(abs(r - 1) <= 0.1 for r in ratios)
        print(f"\n{within} of {len(ratios)} within 10 %; smallest {min(ratios):.3f}, largest {max(ratios):.3f}")
    print(f"{left} cases left out for want of time; {time.perf_counter() - began:.0f} s in all")
    print(f"constants: context {CONTEXT / 1e9}, workspace {WORKSPACE / 1e9}, quantising {QUANTIZING} bytes a number, "
          f"holes {FRAGMENTATION}")  # fmt: skip
    if options.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        print(f"measured: card {total / 2**30:.1f} GiB, outside of the allocator {outside / 1e9:.2f} GB, "
              f"left allocated {torch.cuda.memory_allocated() / 1e9:.3f} GB")  # fmt: skip
    print(f"host memory of this process: {host()}")


def measure(case: Case, device: str) -> float | None:
    gc.collect()
    cuda = device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # Memory that earlier cases have left, without the libraries' workspaces: every prediction includes those.
    left = max(0, torch.cuda.memory_allocated() - WORKSPACE) if cuda else 0
    try:
        predicted, moment = case.predict()
        held = case.run()
        peak = torch.cuda.max_memory_allocated() - left if cuda else None
        reserved = torch.cuda.max_memory_reserved() if cuda else None
        del held
    except Exception as error:  # one line of a table says what could not be measured
        first = (str(error).splitlines() or [""])[0][:90]
        print(f"| {case.name} | – | {type(error).__name__}: {first} | | | |", flush=True)
        return None
    if peak is None or reserved is None:
        print(f"| {case.name} | {predicted / 1e9:.4f} | – | – | – | {moment} |", flush=True)
        return None
    ratio = predicted / peak
    print(
        f"| {case.name} | {predicted / 1e9:.2f} | {peak / 1e9:.2f} | {ratio:.3f} | {reserved / peak:.3f} | {moment} |",
        flush=True,
    )
    return ratio


# --------------------------------------------------------------------------- what is measured


def cases(args: ModelArgs, options: argparse.Namespace) -> Iterator[Case]:
    """All cases. The most telling ones come first, because time may run out."""
    implementations: tuple[Implementation, ...] = ("sparse", "base")
    for implementation in implementations:
        for tokens in options.tokens:
            for recompute in (False, True):
                for kind in ("lora", "full"):
                    yield training(args, options, kind, implementation, tokens, recompute)
    for implementation, formats in (("sparse", (None, "int8", "fp8", "int4", "nf4")), ("base", (None, "int8", "fp8"))):
        for format in formats:
            for context in options.contexts:
                yield inference(args, options, implementation, format, 1, context)
    for batch in (4, 16):
        yield inference(args, options, "sparse", None, batch, options.contexts[0])
    for implementation in implementations:
        for recompute in (True, False):
            yield training(args, options, "lora", implementation, options.tokens[0], recompute, "nf4")
    for tokens in (1024, 1040):  # 256 rows an expert, and more
        for recompute in (True, False):
            yield training(args, options, "lora", "sparse", tokens, recompute, "nf4")
    yield training(args, options, "lora", "sparse", options.tokens[0], False, packing=True)
    yield training(args, options, "full", "sparse", options.tokens[0], False, accumulate=2)
    for format in ("int8", "int4", "nf4"):
        yield loading(args, options, format)


def training(
    args: ModelArgs,
    options: argparse.Namespace,
    kind: str,
    implementation: Implementation,
    tokens: int,
    recompute: bool,
    format: str | None = None,
    *,
    packing: bool = False,
    accumulate: int = 1,
) -> Case:
    rows = 2
    if kind == "lora":
        args = args.replace(lora_rank=16, lora_alpha=16.0, norm_tuning=False)
    task = Training(
        kind="full" if kind == "full" else "lora",
        batch_size=rows,
        max_words=tokens // rows,
        accum_iter=accumulate,
        packing=packing,
        checkpointing=recompute,
    )
    setup = Setup(args=args, task=task, implementation=implementation, quant=Quant.parse(format) or Quant())

    def run() -> Any:
        decoder = made(args, implementation, options.device, format, peft=kind == "lora", train=True)
        for layer in decoder.layers:
            layer.checkpoint_activations(recompute)  # type: ignore[operator]
        trainer = Trainer(decoder, DeviceMesh(), LossWeights(args.load_balancing_weight), clip=2.0)
        batches = [random_batch(args, rows, tokens // rows, packing) for _ in range(accumulate)]
        for _ in range(2):  # the second one begins with the optimiser's moments
            trainer.step(batches, 1e-5)
        return trainer

    name = f"{'Q' * bool(format)}{'LoRA' if kind == 'lora' else 'full'}, {implementation}, {rows} × {tokens // rows}"
    name += (
        ", recomputing" * recompute
        + ", several documents a row" * packing
        + f", {accumulate} micro-steps" * (accumulate > 1)
    )
    return Case(name, partial(predicted_of, setup), run)


def inference(
    args: ModelArgs,
    options: argparse.Namespace,
    implementation: Implementation,
    format: str | None,
    batch: int,
    context: int,
) -> Case:
    prompt = max(1, context - GENERATED)
    task = Inference(batch=batch, context=context, prompt=prompt)
    setup = Setup(args=args, task=task, implementation=implementation, quant=Quant.parse(format) or Quant())

    def run() -> Any:
        decoder = made(args, implementation, options.device, format, peft=False, train=False)
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        engine, r = engine_over(decoder, room_for(batch, context), max_seq_len=context), random.Random(0)
        requests = [engine.add(random_request(r, args.vocab_size, prompt, context - prompt)) for _ in range(batch)]
        while any(request.answer_length < 4 for request in requests) and engine.step():
            pass
        return engine

    name = f"{format or 'bf16'}, {implementation}, {batch} × {context} tokens, then decoding"
    return Case(name, partial(predicted_of, setup), run)


def loading(args: ModelArgs, options: argparse.Namespace, format: str) -> Case:
    """Quantising while loading, from a stream of 16-bit tensors."""
    setup = Setup(args=args, task=Inference(context=2, prompt=1), quant=Quant.parse(format) or Quant())

    def run() -> Any:
        from accessory.build.network import NetworkSpec, build

        quant = Quant.parse(format)
        spec = NetworkSpec(checkpoints=[noise(args)], args=args, implementation="sparse", quant=quant)
        return build(spec, device=options.device)

    return Case(f"{format}, loading and quantising", partial(predicted_of, setup), run)


def predicted_of(setup: Setup) -> tuple[int, str]:
    found = estimate(setup)
    return found.allocated, found.moment


def made(
    args: ModelArgs, implementation: Implementation, device: str, format: str | None, *, peft: bool, train: bool
) -> Decoder:
    """A network as loading makes it, but with random numbers."""
    with torch.device("meta"):
        decoder = Decoder(args, implementation)
        if peft:
            add_adapters(decoder, adapter_specs_for(args), args.lora_scale)
    decoder.cast(torch.bfloat16).compute_in(torch.bfloat16).requires_grad_(False)
    rule = trainable_rule(args, peft)
    for name, p in decoder.named_parameters():
        if train and rule(name):
            p.data = p.data.float()
            p.requires_grad_(True)
    quant = Quant.parse(format)
    if quant is not None:
        quantize_skeleton(decoder, quant)
    decoder.to_empty(device=device)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            fill(name, p)
    return decoder if train else decoder.eval()


def fill(name: str, p: Tensor) -> None:
    if p.dtype in (torch.int8, torch.uint8):
        p.random_(0, 100)
    elif p.dtype == torch.float8_e4m3fn:  # the same row everywhere: torch draws no fp8, and fp32 takes memory
        p.copy_(torch.randn(p.shape[-1], device=p.device).to(p.dtype).expand(p.shape))
    elif name.endswith("norm.weight"):
        p.fill_(1.0)
    elif name.endswith(".scale"):
        p.fill_(0.001)
    else:
        p.normal_(0, 0.02)


def random_batch(args: ModelArgs, rows: int, tokens: int, packing: bool) -> Batch:
    tokens_BT = torch.randint(0, args.vocab_size, (rows, tokens))
    labels_BT = torch.cat([tokens_BT[:, 1:], torch.full((rows, 1), -100)], dim=1)
    documents_BT = torch.arange(tokens).mul(4).div(tokens, rounding_mode="floor") if packing else torch.zeros(tokens)
    documents_BT = documents_BT.long().expand(rows, tokens).contiguous()
    positions_BT = torch.arange(tokens).expand(rows, tokens).contiguous()
    counted_BT = torch.ones(rows, tokens, dtype=torch.bool)
    return Batch(tokens_BT, labels_BT, positions_BT, documents_BT, counted_BT, ())


def host() -> str:
    try:
        with open("/proc/self/status", encoding="utf-8") as handle:
            lines = dict(line.split(":", 1) for line in handle)
    except OSError:
        return "unknown"
    return ", ".join(f"{key} {int(lines[key].split()[0]) / 1e6:.2f} GB" for key in ("VmHWM", "RssAnon") if key in lines)


if __name__ == "__main__":
    main()
