"""On a GPU: the mode in which a request's bits depend on nothing but the request."""

import random

import pytest
import torch
from helpers.random_models import canonical_from_hf, hf_mixtral
from helpers.sizes import TINY
from helpers.traffic import Wish, alone, answers, check_against, stand_random_adapters, tiny_engine, tiny_runner

from accessory.adapt.quant import quantize_skeleton
from accessory.checkpoint.lazy import Constant
from accessory.checkpoint.load import fill
from accessory.config import MoEArgs
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.step_input import Size
from accessory.formats import Quant
from accessory.nn.decoder import Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ARGS = TINY.replace(
    dim=512, hidden_dim=768, n_heads=8, n_kv_heads=2, head_dim=64, vocab_size=1000, max_seq_len=1024,
    moe=MoEArgs(num_experts=8),
)  # fmt: skip
EXACT = 0.0


def network(implementation, format, dtype):
    decoder = Decoder(ARGS, implementation).cast(dtype).compute_in(dtype).eval().requires_grad_(False)
    if format != "none":
        quantize_skeleton(decoder, Quant.parse(format))
    fill(decoder, {name: Constant(tensor) for name, tensor in canonical_from_hf(hf_mixtral(ARGS, std=0.1)).items()})
    return decoder.cuda()


def wishes_of(r, adapters):
    """20 requests: prompts of 1 to 500 tokens, some of which begin alike; greedy and drawn."""
    beginning = [r.randrange(1000) for _ in range(200)]
    wishes = []
    for n in range(20):
        own = [r.randrange(1000) for _ in range(r.choice((1, 2, 63, 64, 65, 130, 300)))]
        drawn = {"temperature": 1.0, "top_p": 0.9, "seed": n} if n % 2 else {}
        params = SamplingParams(logprobs=2, prompt_logprobs=0 if n % 5 == 0 else None, **drawn)
        adapter = r.choice((-1, 0, 1)) if adapters else -1
        wishes.append(Wish([*(beginning if n % 3 else []), *own], r.randint(1, 24), params, adapter=adapter))
    return wishes


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(
    ("implementation", "format", "dtype", "more"),
    [
        ("sparse", "none", torch.bfloat16, ""),
        ("base", "none", torch.bfloat16, ""),
        ("sparse", "int8", torch.bfloat16, ""),
        ("sparse", "int4", torch.bfloat16, ""),
        ("base", "nf4-dq", torch.float16, ""),
        ("sparse", "none", torch.float32, ""),
        ("sparse", "none", torch.bfloat16, "fp8 cache"),
        ("sparse", "none", torch.bfloat16, "adapters"),
        ("sparse", "int8", torch.bfloat16, "adapters"),
    ],
)
def test_bits_do_not_depend_on_what_runs_beside(implementation, format, dtype, more, graphs):
    if more == "fp8 cache" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("kernels for fp8 need a newer card")
    decoder, r = network(implementation, format, dtype), random.Random(1)
    if more == "adapters":
        stand_random_adapters(decoder, torch.Generator().manual_seed(1))
    wishes = wishes_of(r, more == "adapters")
    runner = tiny_runner(decoder, pages=260, deterministic=True, fp8=more == "fp8 cache")
    if graphs:
        assert runner.again(1) is None  # it finds a graph, which has not run yet
        assert runner._graphs.size(Size(1, 0, 0, 1, 1), False).decodes == 1
    singles = alone(runner, wishes)
    if not graphs:  # the same bits as with graphs
        runner._graphs.enabled = False
    for budget, slots, ahead in ((4096, 32, 1), (512, 20, 0), (37, 8, 1), (300, 3, 1), (150, 1, 0)):
        order = r.sample(range(len(wishes)), len(wishes))
        engine = tiny_engine(runner, pages=260, budget=budget, slots=slots, ahead=ahead)
        for number, request in zip(order, answers(engine, [wishes[n] for n in order]), strict=True):
            assert request.error is None
            check_against(request, singles[number], EXACT)
        assert engine.scheduler.counts.put_back == 0


def test_without_the_mode_bits_do_depend():
    """Else the test above would show nothing."""
    runner = tiny_runner(network("sparse", "none", torch.bfloat16), pages=260)
    wishes = wishes_of(random.Random(1), False)
    together, singles = answers(tiny_engine(runner, pages=260, slots=20), wishes), alone(runner, wishes)
    drawn = [[draw.logprob for draw in request.drawn] for request in (*together, *singles)]
    assert drawn[:20] != drawn[20:]
