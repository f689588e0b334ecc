"""The largest moment of a set-up on one GPU: of loading, prompts, a training step; by what takes the memory.

The few constants that are measured and not derived stand below; `benchmarks/plan_check.py` measures them again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from accessory.parallel.sharding import attention_mode
from accessory.planner.activations import NOTHING, Bytes, Layer, Learning, layer_backward, layer_kept, prompt_passes
from accessory.planner.encoders import encoders_bytes, encoding_bytes, features_bytes
from accessory.planner.memory import (
    Inference,
    Piece,
    Setup,
    Training,
    cache_bytes,
    is_trained,
    piece_weight,
    pieces,
    weight_bytes,
)
from accessory.vision_config import CACHE_BYTES

# CUDA's context and torch's kernels in a process, outside of torch's allocator.
CONTEXT = 600_000_000
# What cuBLAS and the other libraries keep inside of it.
WORKSPACE = 70_000_000
# NCCL's buffers and channels, where there are several ranks.
COLLECTIVES = 1_000_000_000
# Of what is taken and given back in every step, the part that lies in holes of torch's allocator.
FRAGMENTATION = 0.05
# Rounding a weight while it is loaded, at most 2²⁴ numbers at a time: in 16 and 32 bits, as 64-bit places of a table.
QUANTIZING = 18
BLOCK_NUMBERS = 2**24
# Cross-entropy widens 1024 rows of logits to fp32 at a time (`ops.cross_entropy`), and holds so many such tensors.
CE_ROWS, CE_TENSORS = 1024, 3


# Up to so many rows an expert, products unpack quantised weights inside (`ops.grouped`, and alone `ops.quantized`).
# Said again here, and held equal by a test, because a plan is made without torch.
TILED_ROWS, TILED_ROWS_BASE = 256, 128


@dataclass(frozen=True)
class Estimate:
    """The largest moment of a set-up on one GPU, by what takes it; `moment` says which moment that is."""

    moment: str
    terms: dict[str, int]

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` would tell."""
        return sum(n for name, n in self.terms.items() if name not in (OUTSIDE, HOLES))

    @property
    def total(self) -> int:
        return sum(self.terms.values())


OUTSIDE, HOLES = "CUDA context, collectives", "holes in the allocator"


def estimate(setup: Setup) -> Estimate:
    """ConfigError, naming the field and both numbers, where the network cannot be cut or quantised so."""
    moments = _inference(setup) if isinstance(setup.task, Inference) else _training(setup, setup.task)
    if setup.views:
        _add_encoders(setup, moments)
    moment, terms = max(moments.items(), key=lambda item: sum(item[1].values()))
    lasting = ("weights", "key/value cache", "optimiser", "image encoders", "features that are kept")
    passing = sum(n for name, n in terms.items() if name not in lasting)
    terms = {name: n for name, n in terms.items() if n}
    terms["libraries' workspace"] = WORKSPACE
    terms[OUTSIDE] = CONTEXT + (COLLECTIVES if setup.gpus > 1 else 0)
    terms[HOLES] = int(FRAGMENTATION * passing)
    return Estimate(moment, terms)


def _add_encoders(setup: Setup, moments: dict[str, dict[str, int]]) -> None:
    """Encoders are loaded behind the network and stay, as do features of earlier images. They look at new ones before
    the network runs, when of its moments nothing is there but what lasts."""
    vision, images, views = setup.args.sees_with, setup.images, setup.views
    lasting = {"image encoders": encoders_bytes(vision), "features that are kept": CACHE_BYTES}
    standing = {name: n for name, n in list(moments.values())[-1].items() if name in ("weights", "optimiser")}
    if isinstance(setup.task, Training):
        before = moments["the end of forward"]["gradients"]  # of earlier micro-steps
        words = 4 * images * setup.image_tokens * setup.args.dim  # projected, and kept in fp32 for backward
    else:
        before = words = 0
    for name, terms in moments.items():
        if name != "loading":
            terms.update(lasting)
        if name not in ("loading", "the optimiser's step"):
            terms["images"] = features_bytes(vision, images * views) + words
    looking = {"gradients": before, "images": encoding_bytes(vision, images, views, setup.tp)}
    moments["looking at images"] = standing | lasting | looking


def _inference(setup: Setup) -> dict[str, dict[str, int]]:
    task, args = setup.task, setup.args
    assert isinstance(task, Inference)
    prompt = task.prompt if task.prompt is not None else task.context - 1
    layer = _layer(setup, task.batch * prompt)
    tiled = layer.experts * (TILED_ROWS_BASE if layer.one_by_one else TILED_ROWS)
    weights = weight_bytes(setup)
    block = min(BLOCK_NUMBERS, max(p.rows * p.columns for p in pieces(setup) if p.role == "product"))
    logits = 4 * task.batch * args.vocab_size * 2  # in 16 bits and in fp32, twice: sampling sorts a copy
    return {
        "loading": {"weights": weights, "quantising": QUANTIZING * block if setup.formats.any else 0},
        "reading the prompt": {
            "weights": weights,
            "key/value cache": cache_bytes(setup),
            "activations": prompt_passes(layer, setup.formats.experts is not None and layer.pairs > tiled),
            "logits": logits,
        },
    }


def _layer(setup: Setup, tokens: int) -> Layer:
    args, tp = setup.args, setup.tp
    base = setup.implementation == "base"
    cut = attention_mode(args, tp) != "whole"
    kv_heads = max(1, args.n_kv_heads // tp) if cut else args.n_kv_heads
    return Layer(
        tokens=tokens,
        pairs=tokens * args.moe.num_experts_per_tok // (tp if base else 1),
        dim=args.dim,
        hidden=args.hidden_dim // (1 if base else tp),
        queries=args.n_heads * args.head_dim // (tp if cut else 1),
        keys=kv_heads * args.head_dim,
        experts=args.moe.num_experts // (tp if base else 1),
        one_by_one=base,
    )


def _training(setup: Setup, task: Training) -> dict[str, dict[str, int]]:
    args, state, dp, L = setup.args, task.state, setup.dp, setup.args.n_layers
    held = list(pieces(setup))
    trained = [p for p in held if is_trained(p, setup)]
    sharded_frozen = task.data_parallel == "fsdp"

    def share(p: Piece, nbytes: int) -> int:
        """Norms and routers lie on every rank; the rest is cut, frozen weights only under fsdp."""
        whole = p.role == "fp32" or dp == 1 or not (sharded_frozen or is_trained(p, setup))
        return nbytes if whole else math.ceil(nbytes / dp)

    weights = sum(share(p, piece_weight(p, setup)) for p in held)
    gradients = sum(share(p, p.numbers * state.gradient) for p in trained)
    moments = sum(share(p, p.numbers * state.moments) for p in trained)
    largest = max(share(p, p.numbers // (L if p.in_layer else 1)) for p in trained)
    outer = sum(share(p, p.numbers * state.gradient) for p in trained if not p.in_layer)
    # The embedding's gradient is the last one made.
    head_gradients = sum(share(p, p.numbers * state.gradient) for p in trained if p.name.startswith("output"))
    layer_gradients = (gradients - outer) // L
    fixed = {"weights": weights, "optimiser": moments}

    layer = _layer(setup, task.batch_size * task.max_words)
    learning = _learning(setup, task, accumulating=task.accum_iter > 1 or dp > 1)
    kept = layer_kept(layer, learning)
    stream = layer.stream
    back = layer_backward(layer, learning)
    copied = sum(p.numbers for p in trained if p.role in ("product", "adapter")) if dp == 1 else 0
    copied_outer = sum(p.numbers for p in trained if p.name.startswith("output")) if dp == 1 else 0
    copies, outer_copies = state.copy * (copied - copied_outer), state.copy * copied_outer
    gathered, reduced = _gathered(setup, task, held) if dp > 1 else (0, 0)
    before = gradients if task.accum_iter > 1 else 0

    rows = task.batch_size * task.max_words
    logits = 2 * 2 * rows * args.vocab_size + CE_TENSORS * 4 * min(CE_ROWS, rows) * args.vocab_size
    head = 2 * stream + (layer.model if task.kind == "full" else 0)
    inputs = L * stream if task.checkpointing else L * kept

    def moment(grads: int, copy: int, kept_now: int, extra: Bytes = NOTHING, head_bytes: int = 0) -> dict[str, int]:
        return {
            **fixed,
            "gradients": max(grads, before) + extra.gradients,
            "16-bit copies of weights": copy + extra.copies,
            "whole weights, summed gradients": gathered + reduced,
            "activations": kept_now + extra.activations,
            "logits": head_bytes,
        }

    earlier = (L - 1) * (stream if task.checkpointing else kept)
    all_copies = 0 if task.checkpointing else copies
    own = Bytes(back.activations, back.gradients, back.copies if dp == 1 else 0)
    first = Bytes(back.activations + stream, own.gradients, own.copies)
    return {
        "the end of forward": moment(0, all_copies + outer_copies, inputs + head, head_bytes=logits),
        "backward of the last layer": moment(head_gradients, all_copies * (L - 1) // L, earlier, first),
        "backward of the first layer": moment(head_gradients + (L - 1) * layer_gradients, 0, 0, first),
        "the optimiser's step": {**fixed, "gradients": gradients, "a gradient's squares": 4 * largest * bool(moments)},
    }


def _learning(setup: Setup, task: Training, accumulating: bool) -> Learning:
    targets = setup.args.lora_targets if setup.args.lora_rank > 0 else ()
    full = task.kind == "full"
    gathered = setup.dp > 1  # products then see 16-bit weights, and give 16-bit gradients, summed in fp32 elsewhere
    return Learning(
        weights=full,
        attention_lora=any(t in targets for t in ("wq", "wk", "wv", "wo")),
        experts_lora=any(t in targets for t in ("w1", "w2", "w3")),
        gate=full or "gate" in targets,
        packed=setup.formats.experts is not None,
        packing=task.packing,
        gradient=2 if gathered else task.state.gradient,
        made=0 if gathered or task.state.weight == 2 else 2,
        copy=0 if gathered else task.state.copy,
        accumulating=accumulating and not gathered,
    )


def _gathered(setup: Setup, task: Training, held: list[Piece]) -> tuple[int, int]:
    """Bytes of whole weights that FSDP2 has put together, and of what it sums of one layer's gradients in fp32."""
    L, packed = setup.args.n_layers, setup.formats.any

    def whole(p: Piece) -> int:
        if is_trained(p, setup):
            return p.numbers * (4 if packed else 2)
        return p.nbytes(2) if task.data_parallel == "fsdp" else 0

    inside = sum(whole(p) for p in held if p.in_layer and p.role != "fp32") // L
    outside = sum(whole(p) for p in held if not p.in_layer and p.role != "fp32")
    reduced = 4 * sum(p.numbers for p in held if p.in_layer and p.role != "fp32" and is_trained(p, setup)) // L
    # fsdp: this layer's, the next one's, and the buffer that it arrives in; sdp: all of them, from forward to backward.
    return outside + inside * (3 if task.data_parallel == "fsdp" else L), reduced
