"""On a GPU: once a model is warmed up, no request makes a kernel be compiled or a graph be captured."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from helpers.traffic import Traffic, Wish, check_empty, stand_random_adapters

from accessory.bench.job import noise
from accessory.build.network import NetworkSpec, build
from accessory.config import ModelArgs, MoEArgs
from accessory.engine.engine import Engine
from accessory.engine.executor import LocalExecutor
from accessory.engine.runner import Runner
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.scheduler import Counts
from accessory.engine.step_input import Size
from accessory.engine.warm_up import warm_up
from accessory.formats import Quant
from accessory.parallel.mesh import DeviceMesh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ARGS = ModelArgs(
    dim=512, hidden_dim=768, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=64, vocab_size=1000, max_seq_len=2048,
    moe=MoEArgs(num_experts=8),
)  # fmt: skip
REQUESTS = 30


def kernels():
    """Triton's functions in this package."""
    import triton

    modules = [module for name, module in sys.modules.items() if name.startswith("accessory.ops.triton")]
    return [value for module in modules for value in vars(module).values() if isinstance(value, triton.JITFunction)]


def compiled():
    """What this process has compiled of them, or loaded from disk: names and what they were specialised on."""
    caches = [(kernel.fn.__name__, cache) for kernel in kernels() for cache, *_ in kernel.device_caches.values()]
    return {(name, key) for name, cache in caches for key in cache}


def wishes_of(r, adapters):
    """Prompts of all lengths, many of which begin alike; drawn in all ways."""
    beginnings = [[], [], *([r.randrange(1000) for _ in range(length)] for length in (64, 70, 200))]
    wishes = []
    for n in range(4 * REQUESTS):
        own = [r.randrange(1000) for _ in range(r.choice((1, 2, 3, 7, 16, 40, 64, 65, 130, 300, 700, 1500)))]
        drawn = r.choice(
            ({}, {"temperature": 1.0, "seed": n}, {"temperature": 0.7, "seed": n, "top_k": 5}, {"logprobs": 2})
        )
        params = SamplingParams(**drawn, prompt_logprobs=1 if r.random() < 0.1 else None)
        adapter = r.choice((-1, 0, 1)) if adapters else -1
        wishes.append(Wish([*r.choice(beginnings), *own], r.randint(1, 24), params, adapter=adapter))
    return wishes


@pytest.mark.parametrize(
    ("implementation", "format", "dtype", "more"),
    [
        ("sparse", "none", torch.bfloat16, ""),
        pytest.param("base", "none", torch.bfloat16, "", marks=pytest.mark.slow),
        ("sparse", "int8", torch.bfloat16, ""),
        pytest.param("sparse", "fp8", torch.bfloat16, "", marks=pytest.mark.slow),
        ("sparse", "int4", torch.bfloat16, ""),
        pytest.param("sparse", "nf4", torch.float16, "", marks=pytest.mark.slow),
        ("sparse", "none", torch.float32, ""),
        ("sparse", "int8", torch.bfloat16, "fp8 cache"),
        pytest.param("sparse", "none", torch.bfloat16, "adapters", marks=pytest.mark.slow),
        ("sparse", "int8", torch.bfloat16, "adapters"),
        ("sparse", "int8", torch.bfloat16, "deterministic"),
    ],
)
def test_nothing_is_compiled_or_captured_afterwards(implementation, format, dtype, more):
    if "fp8" in (format, more[:3]) and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("kernels for fp8 need a newer card")
    quant = None if format == "none" else Quant.parse(format)
    spec = NetworkSpec(checkpoints=[noise(ARGS)], args=ARGS, implementation=implementation, quant=quant)
    decoder = build(spec, DeviceMesh(model=None, all=None), device="cuda", dtype=dtype)
    if more == "adapters":
        stand_random_adapters(decoder, torch.Generator().manual_seed(1))
    runner = Runner(
        decoder, pages=2000, max_seq_len=ARGS.max_seq_len, vocab_size=ARGS.vocab_size, fp8=more == "fp8 cache",
        deterministic=more == "deterministic",
    )  # fmt: skip
    for kernel in kernels():  # other tests have compiled some
        kernel.device_caches.clear()
    engine, captured = Engine.of(LocalExecutor(runner), runner.about), runner._graphs._graphs
    assert engine.compiles
    warm_up(engine, decoder.adapters)
    check_empty(engine)
    assert engine.scheduler.counts == Counts()
    before, graphs = compiled(), len(captured)
    assert before
    if runner._graphs.size(Size(1, 0, 0, 1, 1), False):
        sizes = [size for size in runner._graphs.sizes if not (size.tokens and runner.about.deterministic)]
        flags = (False, True) if decoder.adapters else (False,)
        assert graphs == sum(runner._graphs.fits(size.all_tokens, flag) for size in sizes for flag in flags)
    r = random.Random(1)
    wishes = wishes_of(r, decoder.adapters)
    for _, request in Traffic(engine, wishes, r).run(REQUESTS):
        assert request.finished != "error"
    assert compiled() - before == set()
    assert len(captured) == graphs
