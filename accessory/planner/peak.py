"""The largest moment of a setup on one GPU: of loading, of a prompt or of a training step.

A few constants are measured and not derived. They stand below, and `benchmarks/plan_check.py` measures them again.
"""

from __future__ import annotations

from dataclasses import dataclass

from accessory.limits import (
    GRAPH_TOKENS,
    MAX_RUNNING_CPU,
    MAX_RUNNING_GPU,
    QUANTIZED_AT_ONCE_GPU,
    STEP_TOKENS_CPU,
    STEP_TOKENS_GPU,
)
from accessory.planner.activations import layer_sizes, prompt_peak
from accessory.planner.cache import cache_bytes
from accessory.planner.encoders import encoders_bytes, encoding_bytes, features_bytes
from accessory.planner.setup import Inference, Setup, Training
from accessory.planner.training import training_moments
from accessory.planner.weights import tensor_groups, weight_bytes
from accessory.vision_config import CACHE_BYTES

# CUDA's context and torch's kernels in a process, outside torch's allocator.
CONTEXT = 600_000_000
# What cuBLAS and the other libraries keep inside torch's allocator.
WORKSPACE = 70_000_000
# NCCL's buffers and channels, where there are several ranks.
COLLECTIVES = 1_000_000_000
# Of the memory that every step takes and gives back, the part that lies in holes of torch's allocator.
FRAGMENTATION = 0.05
# Bytes a number while a weight is quantised: in 16 and 32 bits, and as 64-bit places in nf4's table.
QUANTIZING = 18

# Bytes a logit while tokens are drawn from sorted logits: in 16 and 32 bits, with their ids, as weights and their sums.
DRAWING = 48

GRAPHS = "the graphs of steps"
OUTSIDE, HOLES = "CUDA context, collectives", "holes in the allocator"
# What stays from one moment to the next; everything else comes and goes.
LASTING = ("weights", "key/value cache", "optimiser", "image encoders", "features that are kept")


@dataclass(frozen=True)
class Estimate:
    """The bytes of the largest moment on one GPU, by what takes them. `moment` names it."""

    moment: str
    terms: dict[str, int]

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` would say."""
        return sum(n for name, n in self.terms.items() if name not in (OUTSIDE, HOLES))

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def passing(self) -> int:
        """What torch's allocator takes beside all that stays from one moment to the next."""
        return sum(n for name, n in self.terms.items() if name not in (*LASTING, OUTSIDE))


def estimate(setup: Setup) -> Estimate:
    """ConfigError names the field and both numbers where the network cannot be quantised so."""
    task = setup.task
    moments = _inference_moments(setup, task) if isinstance(task, Inference) else training_moments(setup, task)
    if setup.views:
        _add_images(setup, moments)

    def holes(terms: dict[str, int]) -> int:
        return int(FRAGMENTATION * sum(n for name, n in terms.items() if name not in LASTING))

    moment, terms = max(moments.items(), key=lambda item: sum(item[1].values()) + holes(item[1]))
    gaps, terms = holes(terms), {name: n for name, n in terms.items() if n}
    terms["libraries' workspace"] = WORKSPACE
    terms[OUTSIDE] = CONTEXT + (COLLECTIVES if setup.gpus > 1 else 0)
    terms[HOLES] = gaps
    return Estimate(moment, terms)


def _inference_moments(setup: Setup, task: Inference) -> dict[str, dict[str, int]]:
    prompt = task.prompt if task.prompt is not None else task.context - 1
    on_gpu = setup.device == "cuda"
    # A step computes at most so many tokens of prompts, and draws for at most so many sequences.
    tokens, at_once = task.batch * prompt, STEP_TOKENS_GPU if on_gpu else STEP_TOKENS_CPU
    # The last ones may fit a graph, which has room for the next larger number of them and keeps its memory. Where no
    # length of prompts is given, all may come.
    last = min(tokens, GRAPH_TOKENS[-1]) if task.prompt is None else tokens % at_once
    graph = next((n for n in GRAPH_TOKENS if n >= last), 0) if on_gpu and last else 0
    recorded, computed = (
        prompt_peak(layer_sizes(setup, n), setup.quant.experts) if n else 0
        for n in (graph, min(tokens, at_once) if tokens > graph else 0)
    )
    logits = min(task.batch, MAX_RUNNING_GPU if on_gpu else MAX_RUNNING_CPU) * setup.args.vocab_size
    held = {"weights": weight_bytes(setup), "key/value cache": cache_bytes(setup)}
    largest = max(g.rows * g.columns for g in tensor_groups(setup) if g.role == "product")
    quantized = min(QUANTIZED_AT_ONCE_GPU, largest)
    return {
        "loading": {"weights": held["weights"], "quantising": QUANTIZING * quantized if setup.quantized else 0},
        "drawing tokens": {**held, GRAPHS: recorded, "logits": DRAWING * logits},
        "reading the prompt": {
            **held,
            GRAPHS: recorded,
            "activations": computed,
            "logits": setup.dense_bytes * logits,
        },
    }


def _add_images(setup: Setup, moments: dict[str, dict[str, int]]) -> None:
    """Add the image encoders and what they make to the moments, and the moment at which they encode.

    Encoders are loaded after the network and stay, as do features of earlier images. They encode new images before the
    network runs: of its own memory only what lasts is there then. On a GPU that generates, encoding is a CUDA graph,
    whose memory stays too.
    """
    vision, images, views = setup.args.sees_with, setup.images, setup.views
    lasting = {"image encoders": encoders_bytes(vision), "features that are kept": CACHE_BYTES}
    network = {name: n for name, n in list(moments.values())[-1].items() if name in ("weights", "optimiser")}
    if isinstance(setup.task, Training):
        gradients = moments["the end of forward"]["gradients"]  # of earlier micro-steps
        embeddings = 4 * images * setup.image_tokens * setup.args.dim  # fp32, kept for backward
    else:
        gradients = embeddings = 0
    encoding = {"gradients": gradients, "images": encoding_bytes(vision, images, views, setup.tp)}
    graphed = isinstance(setup.task, Inference) and setup.device == "cuda"
    for name, terms in moments.items():
        if name != "loading":
            terms.update(lasting)
            terms["the encoders' graph"] = encoding["images"] if graphed else 0
        if name not in ("loading", "the optimiser's step"):
            terms["images"] = features_bytes(vision, images * views) + embeddings
    moments["looking at images"] = network | lasting | encoding
