"""A peer: transformers' `MixtralForCausalLM` of the same sizes, with random weights of its own."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accessory.bench import decode, floors, prefill, training
from accessory.bench.card import free, peak_gb, seconds_of
from accessory.bench.figures import Figure
from accessory.bench.job import Job
from accessory.errors import MissingExtraError

NAME = "transformers"
# As transformers' own `generate`: products of gathered weights for few (token, expert) pairs, else grouped ones.
FEW_PAIRS = 8
ROUNDS = 5


def require() -> None:
    """MissingExtraError where transformers is not installed."""
    import importlib.util

    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("--vs transformers: it needs transformers: pip install 'mixtral-accessory[vision]'")


def measure(job: Job, what: str) -> None:
    """The figures of `what`. Nothing of the peer stays in memory."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    if what == "train":
        for part in job.parts:
            for who, make in training_steps(job, part):
                for batch in job.batches:
                    free(job.device)
                    training.add(job, who, part, batch, partial(make, batch), peer=True)
    else:
        model = make_model(job, job.dtype).eval()
        with torch.no_grad():
            for batch in job.batches:
                (_decode if what == "decode" else _prefill)(job, model, batch)
        del model
    torch._dynamo.reset()
    free(job.device)


def make_model(job: Job, dtype: torch.dtype) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    args = job.args
    sizes: dict[str, Any] = {
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "head_dim": args.head_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size,
        "num_local_experts": args.moe.num_experts,
        "num_experts_per_tok": args.moe.num_experts_per_tok,
        "sliding_window": None,
        "use_cache": True,
        "attn_implementation": "sdpa",
    }
    config = MixtralConfig(**sizes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(job.device):
            model = MixtralForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.02)
    model.set_experts_implementation("grouped_mm")
    return model


# --------------------------------------------------------------------------- decoding and prompts


def _decode(job: Job, model: Any, batch: int) -> None:
    """Steps over a static cache, compiled into CUDA graphs as `generate` does; on a CPU as they are."""
    from transformers import StaticCache

    args, steps = job.args, max(4, job.tokens[0])
    pairs = batch * args.moe.num_experts_per_tok
    experts = "batched_mm" if pairs <= FEW_PAIRS else "grouped_mm"
    ids_BT = torch.randint(3, args.vocab_size, (batch, job.context), device=job.device)
    cache = StaticCache(config=model.config, max_cache_len=job.context + 2 * steps + 16)
    model.set_experts_implementation("grouped_mm")
    token_B1 = model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    model.set_experts_implementation(experts)
    compiled = job.device.type == "cuda"
    forward = torch.compile(model.forward, mode="reduce-overhead", dynamic=False) if compiled else model.forward
    who = f"{NAME} {experts}" + (", compiled" if compiled else "")
    figure = Figure(who=who, what=decode.what_of(batch), peer=True)

    def many(count: int) -> None:
        nonlocal token_B1
        for _ in range(count):
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            out = forward(token_B1, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token_B1 = out.logits[:, -1:].argmax(-1).clone()

    try:
        many(6 if compiled else 1)
        seconds = seconds_of(lambda: many(steps), job.device, rounds=1, warm=1) / steps
    except Exception as error:  # a line of the table says what could not be measured
        job.add(figure.failed(error))
        return
    context = job.context + steps / 2
    moved = floors.decode_bytes(args, None, batch, context, number=job.dtype.itemsize)
    work = floors.decode_operations(args, batch, context)
    memory = peak_gb(job.device)
    job.add(replace(figure, seconds=seconds, tokens=batch, nbytes=moved, operations=work, peak_gb=memory))


def _prefill(job: Job, model: Any, batch: int) -> None:
    ids_BT = torch.randint(3, job.args.vocab_size, (batch, job.prompt), device=job.device)
    figure = Figure(who=f"{NAME} grouped_mm", what=prefill.what_of(batch, job.prompt), peer=True)
    try:
        seconds = seconds_of(
            lambda: model(ids_BT, use_cache=False, logits_to_keep=1), job.device, rounds=ROUNDS, warm=2
        )
    except Exception as error:
        job.add(figure.failed(error))
        return
    work = floors.prompt_operations(job.args, batch, job.prompt, every_logit=False)
    memory = peak_gb(job.device)
    job.add(replace(figure, seconds=seconds, tokens=batch * job.prompt, operations=work, peak_gb=memory))


# --------------------------------------------------------------------------- training


def training_steps(job: Job, part: str) -> Iterator[tuple[str, Callable[[int], Callable[[], Any]]]]:
    """(who, a function from a batch to its step) of each way to do a part of `training`."""
    if part == "passes":
        yield f"{NAME} grouped_mm", lambda batch: _passes(job, batch)
    elif part == "full":
        yield f"{NAME} grouped_mm, autocast", lambda batch: _full(job, batch)
    else:
        yield f"{NAME} + peft, attention and experts", lambda batch: _lora(job, batch, experts=True)
        yield f"{NAME}, frozen, nothing added", lambda batch: _frozen(job, batch)


def _training_model(job: Job, dtype: torch.dtype) -> Any:
    return _recomputing(job, make_model(job, dtype).train())


def _recomputing(job: Job, model: Any) -> Any:
    if job.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _backward(model: Any, tokens_BT: Tensor) -> None:
    model(tokens_BT, labels=tokens_BT, use_cache=False, output_router_logits=True).loss.backward()


def _tokens(job: Job, batch: int) -> Tensor:
    return torch.randint(0, job.args.vocab_size, (batch, job.tokens[0]), device=job.device)


def _passes(job: Job, batch: int) -> Callable[[], None]:
    model, tokens_BT = _training_model(job, job.dtype), _tokens(job, batch)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        _backward(model, tokens_BT)

    return step


def _full(job: Job, batch: int) -> Callable[[], None]:
    model = _training_model(job, torch.float32)
    return _step(job, model, list(model.parameters()), batch)


def _frozen(job: Job, batch: int) -> Callable[[], None]:
    """What no LoRA can beat: the gradient of the input alone."""
    model, tokens_BT = _training_model(job, job.dtype).requires_grad_(False), _tokens(job, batch)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_(True))
    return lambda: _backward(model, tokens_BT)


def _lora(job: Job, batch: int, *, experts: bool) -> Callable[[], None]:
    from peft import LoraConfig, get_peft_model

    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    rank = training.RANK
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, target_parameters=stacks)
    model = _recomputing(job, get_peft_model(make_model(job, job.dtype).train(), config))
    model.enable_input_require_grads()
    return _step(job, model, [p for p in model.parameters() if p.requires_grad], batch)


def _step(job: Job, model: Any, trained: list[Any], batch: int) -> Callable[[], None]:
    """A whole step with AdamW, under autocast."""
    tokens_BT, cuda = _tokens(job, batch), job.device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), fused=cuda)

    def step() -> None:
        with torch.autocast(job.device.type, job.dtype) if job.dtype != torch.float32 else contextlib.nullcontext():
            _backward(model, tokens_BT)
        torch.nn.utils.clip_grad_norm_(trained, 2.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
