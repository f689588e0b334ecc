"""On a GPU: decode, prefill and training of quantised networks, against the network of dequantised weights."""

import itertools

import pytest
import torch
from helpers.generating import answers, engine_over
from helpers.random_models import canonical_from_hf, decoder_from_canonical, hf_mixtral
from helpers.sizes import SPEAKING
from helpers.training import make_decoder

from accessory.config import MoEArgs
from accessory.formats import FORMATS, Quant
from accessory.ops import dispatch
from accessory.ops.fp8 import fp8_grouped_linear, fp8_linear, to_fp8_rows
from accessory.ops.quantized import dequantize, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
ARGS = SPEAKING.replace(dim=256, hidden_dim=384, n_kv_heads=2, head_dim=32, vocab_size=512, moe=MoEArgs())


@pytest.fixture(scope="module")
def tensors():
    return {n: t.clone() for n, t in canonical_from_hf(hf_mixtral(ARGS)).items()}


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def pair(tensors, implementation, format):
    """(the quantised network, the dense one of its dequantised weights), bf16 on the GPU."""
    quant = Quant.parse(format, output="int8")
    rounded = {n: dequantize(quantize(t, f)) if (f := quant.format_of(n)) else t for n, t in tensors.items()}
    packed = make_decoder(
        implementation, tensors=tensors, args=ARGS, device="cuda", dtype=torch.bfloat16, quant=format
    ).requires_grad_(False)
    return packed, decoder_from_canonical(ARGS, implementation, rounded, torch.float32).cuda()


def median_error(got, want):
    """The median over tokens of the logits' relative error.

    The median ignores the few tokens that rounding sends to another expert: their logits differ rightly.
    """
    return ((got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1)).median().item()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("implementation", ["base", "sparse"])
@pytest.mark.parametrize("tokens", [(1, 1), (3, 2), (2, 40)], ids=str)
@torch.no_grad()
def test_logits_are_those_of_the_dequantized_network(tensors, format, implementation, tokens, monkeypatch):
    packed, dense = pair(tensors, implementation, format)
    # fp8's own products, which round inputs too, are compared below.
    monkeypatch.setattr("accessory.ops.dispatch._capability", lambda device: (8, 9))
    ids = torch.randint(0, 512, tokens, generator=torch.Generator().manual_seed(1)).cuda()
    assert median_error(packed(ids).logits, dense(ids).logits) <= 3e-2


@pytest.mark.skipif(not HAS_FP8, reason="this card has no fp8 products by row")
@pytest.mark.parametrize("implementation", ["base", "sparse"])
@torch.no_grad()
def test_a_prompt_in_fp8_is_one_whose_inputs_were_rounded(tensors, implementation, monkeypatch):
    packed, _ = pair(tensors, implementation, "fp8")
    ids = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(1)).cuda()
    got = packed(ids).logits

    def rounded(x):
        q, scale = to_fp8_rows(x)
        return q.float() * scale

    def linear(x, w):
        return (rounded(x) @ dequantize(w).T).to(x.dtype)

    def grouped(x, w, count):
        starts = [0, *count.cumsum(0).tolist()]
        return torch.cat([linear(x[a:b], w[e]) for e, (a, b) in enumerate(itertools.pairwise(starts))])

    plain, load = {"fp8:fp8_linear": linear, "fp8:fp8_grouped_linear": grouped}, dispatch._load
    monkeypatch.setattr(dispatch, "_load", lambda function: plain.get(function) or load(function))
    # Neighbouring fp8 numbers are 6% apart. How an earlier product was rounded decides to which of two an input goes.
    assert median_error(got, packed(ids).logits) <= 8e-2


@pytest.mark.parametrize("format", FORMATS)
def test_graphs_write_what_the_plain_path_writes(tensors, format):
    packed, _ = pair(tensors, "sparse", format)
    prompts = [[1, 5, 9, 200], [1, 7, 30, 11]]
    # With one page a sequence, both divide attention in the same way.
    plain, graphed = (
        answers(engine_over(packed, graphs=graphs, max_seq_len=64), prompts, 12) for graphs in (False, True)
    )
    assert graphed == plain


@pytest.mark.skipif(not HAS_FP8, reason="this card has no fp8 products by row")
@torch.no_grad()
def test_fp8_products_round_inputs_and_nothing_else():
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(70, 256, generator=g, device="cuda", dtype=torch.bfloat16)
    w = quantize(torch.randn(8, 128, 256, generator=g, device="cuda") * 0.1, "fp8")
    assert dispatch.choose(dispatch.product("grouped", x, w, len(x))).function == "fp8:fp8_grouped_linear"
    assert relative(fp8_linear(x, w[3]), x.float() @ dequantize(w[3]).T) <= 4e-2
    count_E = torch.tensor([10, 0, 20, 5, 5, 0, 29, 1], device="cuda")
    got = fp8_grouped_linear(x, w, count_E)
    rows = x.split(count_E.tolist())
    want = torch.cat([r.float() @ dequantize(w[e]).T for e, r in enumerate(rows)])
    assert relative(got, want) <= 4e-2


@pytest.mark.parametrize("implementation", ["base", "sparse"])
def test_lora_learns_beside_quantized_experts(tensors, implementation):
    from helpers.training import batches

    from accessory.parallel.mesh import DeviceMesh
    from accessory.train.trainer import LossWeights, Trainer

    curves = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        peft = {"lora_rank": 8}
        decoder = make_decoder(
            implementation, tensors=tensors, args=ARGS, device=device, dtype=dtype, quant="nf4", peft=peft
        )
        trainer = Trainer(decoder, DeviceMesh(), LossWeights(0.1), clip=1.0)
        curves.append([trainer.step(batches(n), 1e-3)["loss"] for n in range(5)])
    assert curves[1] == pytest.approx(curves[0], rel=2e-2)
