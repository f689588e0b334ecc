"""Times prompts and decoding of Mixtral-8x7B at its real size, with random weights, against the floor of one card.

    python benchmarks/gpu_generate.py [--layers 32] [--implementation sparse base] [--transformers]

The floor of a decoded token is the number of bytes that its products must read (attention, router, the chosen experts,
output head), divided by the card's copy rate, which is measured in the same run. The floor of a prompt is its
operations, divided by the measured bf16 matmul rate. `--transformers` also times the `generate` of transformers on the
same sizes, after ours and with its own random weights. Prints Markdown.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from engine_steps import decode, engine_over, room_for

from accessory.config import PRESETS, Implementation, ModelArgs
from accessory.nn.decoder import Decoder, init_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="8x7b", choices=PRESETS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--implementation", nargs="+", default=["sparse", "base"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, nargs="+", default=[2048])
    parser.add_argument("--transformers", action="store_true")
    options = parser.parse_args()
    args = PRESETS[options.preset]
    args = args.replace(n_layers=options.layers or args.n_layers)
    copy, matmul = card_rates()
    print(
        f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, bf16 matmul {matmul / 1e12:.0f} TFLOP/s; "
        f"torch {torch.__version__}; {args.n_layers} layers, {args.parameter_counts()[0] / 1e9:.2f} B parameters\n"
    )
    print("| who | what | ms | tokens/s | times the floor |")
    print("|---|---|---|---|---|")
    for implementation in options.implementation:
        free()
        ours(args, implementation, options, copy, matmul)
    if options.transformers:
        free()
        theirs(args, options, copy)


def decode_floor(args: ModelArgs, batch: int, copy: float) -> float:
    """Seconds of a step: a batch of B reads the expected number of distinct experts, E · (1 - (1 - K/E)^B)."""
    active = args.parameter_counts()[1]
    E, K = args.moe.num_experts, args.moe.num_experts_per_tok
    experts = args.n_layers * 3 * args.dim * args.hidden_dim
    dense = active - K * experts
    return 2 * (dense + experts * E * (1 - (1 - K / E) ** batch)) / copy


def report(who: str, what: str, seconds: float, tokens: int, floor: float) -> None:
    print(f"| {who} | {what} | {seconds * 1e3:.2f} | {tokens / seconds:.0f} | {seconds / floor:.2f} |", flush=True)


def ours(
    args: ModelArgs, implementation: Implementation, options: argparse.Namespace, copy: float, matmul: float
) -> None:
    with torch.device("meta"):
        decoder = Decoder(args, implementation).cast(torch.bfloat16)
    decoder.to_empty(device="cuda").requires_grad_(False)
    init_weights(decoder)
    torch.cuda.synchronize()
    print(f"| {implementation} | resident, GB | {torch.cuda.memory_allocated() / 1e9:.1f} | – | – |", flush=True)
    for batch in options.batch:
        engine = engine_over(decoder, room_for(batch, options.prompt + options.tokens))
        found = decode(engine, args.vocab_size, batch, options.prompt, options.tokens, rounds=3)
        seconds, kind = statistics.median(found.seconds), "graph" if found.graph else "eager"
        report(implementation, f"decode, batch {batch}, {kind}", seconds, batch, decode_floor(args, batch, copy))
        print(f"| {implementation} | second token of the first call after, s | {found.ready:.2f} | – | – |", flush=True)
        del engine  # frees the cache too
    for length in options.prefill:
        tokens = torch.randint(0, args.vocab_size, (1, length), device="cuda")
        rows_N = torch.zeros(1, dtype=torch.int64, device="cuda")
        with torch.inference_mode():
            seconds = timed(partial(decoder, tokens, rows_N=rows_N))
        flops = 2 * (args.parameter_counts()[1] - args.vocab_size * args.dim) * length
        flops += args.n_layers * 2 * length**2 * args.n_heads * args.head_dim  # causal: half of 4 · T² · H · d
        report(implementation, f"prompt of {length}", seconds, length, flops / matmul)
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"| {implementation} | peak, GB | {peak:.1f} | – | – |", flush=True)


def theirs(args: ModelArgs, options: argparse.Namespace, copy: float) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        vocab_size=args.vocab_size,
        num_local_experts=args.moe.num_experts,
        num_experts_per_tok=args.moe.num_experts_per_tok,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cuda").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config, device="cuda")
    for batch in options.batch:
        ids = torch.randint(3, args.vocab_size, (batch, options.prompt), device="cuda")

        how = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        first, whole = (
            timed(partial(model.generate, ids, max_new_tokens=n, min_new_tokens=n, **how), 3)
            for n in (1, options.tokens)
        )
        seconds = (whole - first) / (options.tokens - 1)
        report("transformers", f"generate, batch {batch}", seconds, batch, decode_floor(args, batch, copy))


def timed(run: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds, after a warm-up."""
    times = []
    for n in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if n:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def card_rates() -> tuple[float, float]:
    """(bytes/s of a device copy counting reads and writes, bf16 FLOP/s of an 8192³ product)."""
    a = torch.randn(2**30, dtype=torch.float32, device="cuda")
    copy = 2 * a.nbytes / timed(partial(torch.empty_like(a).copy_, a), 20)
    x, y = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    matmul = 2 * 8192**3 / timed(partial(torch.matmul, x, y), 20)
    return copy, matmul


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
