"""Times a training step of Mixtral-8x7B's real layers with random weights on one card: ours and transformers'.

    python benchmarks/gpu_train.py [--layers 2] [--batch 2] [--tokens 2048] [--parts passes full lora]

`passes` is forward and backward on bf16 weights, without an optimiser. `full` is a whole step with weights, gradients
and AdamW in fp32 and bf16 products; transformers runs it under autocast. `lora` is a step of LoRA (rank 16, attention
and experts) on frozen bf16 weights. transformers runs it through peft where that is installed, and once more with all
weights frozen and nothing added, which no LoRA can beat. Every figure includes the balance loss. The floor is the
operations of the products (three times forward's, twice for a frozen base), divided by the measured bf16 matmul rate.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from accessory.adapt.peft import adapter_specs_for, add_adapters, trainable_rule
from accessory.config import PRESETS, Implementation, ModelArgs
from accessory.data.batches import Batch
from accessory.nn.decoder import Decoder, init_weights
from accessory.parallel.mesh import DeviceMesh
from accessory.train.trainer import LossWeights, Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="8x7b", choices=PRESETS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--parts", nargs="+", default=["passes", "full", "lora"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-transformers", action="store_true")
    options = parser.parse_args()
    args = PRESETS[options.preset].replace(n_layers=options.layers)
    rate = matmul_rate(options.device)
    forward = forward_flops(args, options.batch, options.tokens)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(
        f"{name}: bf16 matmul {rate / 1e12:.3g} TFLOP/s; torch {torch.__version__}; {options.layers} layers, "
        f"{args.parameter_counts()[0] / 1e9:.2f} B parameters, {options.batch} × {options.tokens} tokens\n"
    )
    print("| what | who | ms | tokens/s | times the floor | peak GB |\n|---|---|---|---|---|---|")
    table = Table(options, forward / rate)
    for part in options.parts:
        for implementation in ("sparse", "base"):
            for recompute in (False, True):
                table.row(
                    part, f"ours, {implementation}", ours(part, args, implementation, recompute, options), recompute
                )
        if not options.no_transformers:
            for who, make in theirs(part, args, options):
                for recompute in (False, True):
                    table.row(part, who, lambda m=make, r=recompute: m(r), recompute)


class Table:
    def __init__(self, options: argparse.Namespace, forward_s: float) -> None:
        self.options, self.forward_s = options, forward_s

    def row(self, part: str, who: str, make: Callable[[], Callable[[], Any]], recompute: bool) -> None:
        free()
        what = part + (", recomputing" if recompute else "")
        try:
            step = make()
            step()
            step()
            reset_peak()
            times = []
            for _ in range(self.options.rounds):
                wait()
                began = time.perf_counter()
                step()
                wait()
                times.append(time.perf_counter() - began)
            seconds = statistics.median(times)
        except Exception as error:  # one line of a table says what could not be measured
            print(f"| {what} | {who} | {type(error).__name__}: {str(error).splitlines()[0][:90]} | | | |", flush=True)
            return
        floor = self.forward_s * (2 if part == "lora" else 3)
        rate = self.options.batch * self.options.tokens / seconds
        numbers = f"{seconds * 1e3:.1f} | {rate:,.0f} | {seconds / floor:.2f} | {peak():.1f}"
        print(f"| {what} | {who} | {numbers} |", flush=True)


def ours(
    part: str, args: ModelArgs, implementation: Implementation, recompute: bool, options: argparse.Namespace
) -> Callable[[], Callable[[], Any]]:
    def make() -> Callable[[], Any]:
        lora = args.replace(lora_rank=16, lora_alpha=16.0, norm_tuning=False)
        with torch.device("meta"):
            decoder = Decoder(args, implementation)
            if part == "lora":
                add_adapters(decoder, adapter_specs_for(lora), lora.lora_scale)
        decoder.cast(torch.bfloat16).compute_in(torch.bfloat16)
        rule = trainable_rule(lora, part == "lora")
        for name, p in decoder.named_parameters():
            p.requires_grad_(rule(name))
            if rule(name) and part != "passes":
                p.data = p.data.float()
        decoder.to_empty(device=options.device)
        init_weights(decoder)
        for layer in decoder.layers:
            layer.recompute = recompute
        trainer = Trainer(decoder, DeviceMesh(), LossWeights(args.load_balancing_weight), clip=2.0)
        batch = random_batch(args, options)
        if part != "passes":
            return lambda: trainer.step([batch], 1e-5)

        def forward_backward() -> None:
            trainer.optimizer.zero_grad()
            trainer.forward_backward([batch])

        return forward_backward

    return make


def random_batch(args: ModelArgs, options: argparse.Namespace) -> Batch:
    B, T = options.batch, options.tokens
    tokens_BT = torch.randint(0, args.vocab_size, (B, T))
    labels_BT = torch.cat([tokens_BT[:, 1:], torch.full((B, 1), -100)], dim=1)
    positions_BT = torch.arange(T).expand(B, T).contiguous()
    zeros_BT = torch.zeros(B, T, dtype=torch.int64)
    return Batch(tokens_BT, labels_BT, positions_BT, zeros_BT, torch.ones(B, T, dtype=torch.bool), ())


def theirs(part: str, args: ModelArgs, options: argparse.Namespace) -> list[tuple[str, Callable[[bool], Any]]]:
    def build(dtype: torch.dtype) -> Any:
        from transformers import MixtralConfig, MixtralForCausalLM

        config = MixtralConfig(
            hidden_size=args.dim,
            intermediate_size=args.hidden_dim,
            num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads,
            num_key_value_heads=args.n_kv_heads,
            vocab_size=args.vocab_size,
            sliding_window=None,
        )
        config._attn_implementation = "sdpa"
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(options.device):
                model = MixtralForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        model.set_experts_implementation("grouped_mm")
        return model.train()

    tokens_BT = torch.randint(0, args.vocab_size, (options.batch, options.tokens), device=options.device)

    def recomputing(model: Any, recompute: bool) -> Any:
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def backward(model: Any) -> None:
        model(tokens_BT, labels=tokens_BT, use_cache=False, output_router_logits=True).loss.backward()

    def forward_backward(recompute: bool) -> Callable[[], None]:
        model = recomputing(build(torch.bfloat16), recompute)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            backward(model)

        return step

    def full(recompute: bool) -> Callable[[], None]:
        model = recomputing(build(torch.float32), recompute)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=options.device == "cuda")

        def step() -> None:
            with torch.autocast(options.device, torch.bfloat16):
                backward(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def frozen(recompute: bool) -> Callable[[], None]:
        model = recomputing(build(torch.bfloat16), recompute).requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_(True))
        return lambda: backward(model)

    def lora(experts: bool) -> Callable[[bool], Any]:
        def make(recompute: bool) -> Callable[[], None]:
            from peft import LoraConfig, get_peft_model

            stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None
            targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
            config = LoraConfig(r=16, lora_alpha=16, target_modules=targets, target_parameters=stacks)
            model = recomputing(get_peft_model(build(torch.bfloat16), config), recompute)
            trained = [p for p in model.parameters() if p.requires_grad]
            model.enable_input_require_grads()
            optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), fused=options.device == "cuda")

            def step() -> None:
                with torch.autocast(options.device, torch.bfloat16):
                    backward(model)
                torch.nn.utils.clip_grad_norm_(trained, 2.0)
                optimizer.step()
                optimizer.zero_grad()

            return step

        return make

    return {
        "passes": [("transformers, grouped_mm", forward_backward)],
        "full": [("transformers, grouped_mm, autocast", full)],
        "lora": [
            ("transformers + peft, attention and experts", lora(True)),
            ("transformers + peft, attention only", lora(False)),
            ("transformers, frozen, nothing added", frozen),
        ],
    }[part]


def forward_flops(args: ModelArgs, batch: int, tokens: int) -> float:
    """Operations, two a multiplication: the products of every token (the embedding has none) and causal attention."""
    products = 2 * (args.parameter_counts()[1] - (2 * args.n_layers + 1) * args.dim) * batch * tokens
    return products + batch * args.n_layers * 2 * tokens**2 * args.n_heads * args.head_dim


def matmul_rate(device: str) -> float:
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        wait()
        began = time.perf_counter()
        a @ b
        wait()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(times[2:])


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")


if __name__ == "__main__":
    main()
