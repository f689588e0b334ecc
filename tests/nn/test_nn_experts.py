"""Both implementations of the experts: without the host, and with several adapters."""

import pytest
import torch
from helpers.adapted import feed_forward, random_kind
from helpers.sizes import CUTTABLE

from accessory.adapt.peft import adapter_specs_for, add_adapters
from accessory.adapt.quant import quantize_skeleton
from accessory.formats import FORMATS, Quant
from accessory.limits import GRAPH_BUCKETS
from accessory.nn.decoder import Decoder
from accessory.nn.experts_base import BaseExperts
from accessory.nn.experts_sparse import SparseExperts
from accessory.nn.linear import Linear, PackedWeight
from accessory.ops import dispatch, linear
from accessory.ops.experts import grouped_experts
from accessory.ops.linear import AdapterRows, LinearAdapter
from accessory.ops.quantized import quantize


@pytest.mark.parametrize("quant", [None, "int8"])
@torch.no_grad()
def test_base_without_the_host_is_its_loop(quant):
    """On a GPU, base sorts and multiplies as sparse does. Its loop over experts is the same function."""
    g = torch.Generator().manual_seed(0)
    base = BaseExperts(16, 24, 3, first=2)
    for kind, lora in (("w1", 2), ("w2", 3), ("w3", 0)):
        base.add_bias(kind)
        if lora:
            base.add_lora(kind, lora, 0.5)
    for p in base.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.3
    base.bias_factor = 0.0
    for kind in ("w1", "w2", "w3") if quant else ():
        packed, w = quantize(getattr(base, kind), quant), PackedWeight(quant, getattr(base, kind).shape, "cpu")
        for name, piece in packed.tensors().items():
            w.get_parameter(name).data = piece
        delattr(base, kind)
        setattr(base, kind, w)
    base.compute_dtype = torch.float32
    x, weight = torch.randn(9, 16, generator=g), torch.rand(9, 2, generator=g)
    expert = torch.stack([torch.randperm(6, generator=g)[:2] for _ in range(9)])
    loop = base.grouped(x, weight, expert, None)
    torch.testing.assert_close(grouped_experts(x, *base.all_weights(), weight, expert, base.first), loop)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("kind", [BaseExperts, SparseExperts])
@torch.no_grad()
def test_several_adapters_stand_beside_experts(kind, tokens):
    g = torch.Generator().manual_seed(0)
    experts, shapes = kind(16, 24, 4), ((24, 16), (16, 24), (24, 16))
    kinds = [random_kind(torch.randn(4, *s, generator=g) * 0.3, (2, 0, 5), False, g, torch.float32) for s in shapes]
    for name, drawn in zip(("w1", "w2", "w3"), kinds, strict=True):
        getattr(experts, name).data = drawn.weight
    experts.requires_grad_(False).fuse()
    x, weight = torch.randn(tokens, 16, generator=g), torch.rand(tokens, 2, generator=g)
    expert = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(tokens)])
    adapter = torch.arange(tokens) % 4 - 1 if tokens > 1 else torch.tensor([2])
    bare = experts(x, weight, expert)
    for name, drawn in zip(("w1", "w2", "w3"), kinds, strict=True):
        experts.set_adapters(name, drawn.adapters)
    want = feed_forward(x, kinds, weight, expert, adapter, range(4))
    got = experts(x, weight, expert, AdapterRows(adapter, 3))
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(got, bare)
    for name in ("w1", "w2", "w3"):
        experts.set_adapters(name, [None, None])
    assert torch.equal(experts(x, weight, expert), bare)


def test_several_adapters_stand_beside_a_linear():
    linear = Linear(6, 5).requires_grad_(False)
    torch.nn.init.normal_(linear.weight)
    loras = [LinearAdapter(torch.randn(r, 6), torch.randn(5, r), 2.0) for r in (1, 3)]
    x = torch.randn(1, 3, 6)
    linear.set_adapters(loras)
    got = linear(x, AdapterRows(torch.tensor([1, -1, 0]), 2))
    merged = [linear.weight + 2.0 * lora.b @ lora.a for lora in loras]
    for y, w, x_I in zip(got[0], (merged[1], linear.weight, merged[0]), x[0], strict=True):
        torch.testing.assert_close(y, w @ x_I)
    linear.set_adapters([])
    assert torch.equal(linear(x), x @ linear.weight.T)


# --------------------------------------------------------------------------- graphs of decoding steps

ADAPTERS = {
    "none": {},
    "LoRA": {"lora_rank": 16},
    "LoRA of a rank without a grouped product": {"lora_rank": 4},
    "LoRA of attention": {"lora_rank": 4, "lora_targets": ("wq", "wv")},
    "LoRA of w2": {"lora_rank": 8, "lora_targets": ("w2",)},
    "biases": {"bias_tuning": True},
}


@pytest.fixture
def meta_is_an_h100(monkeypatch):
    """The meta device passes for a card of compute capability 9.0 with Triton."""

    def product(*args, **options):
        found = dispatch_product(*args, **options)
        return found._replace(device="cuda", capability=(9, 0), triton=True)

    dispatch_product = dispatch.product
    for module in (dispatch, linear):
        monkeypatch.setattr(module, "product", product)
    for kind in (torch.Tensor, PackedWeight):
        monkeypatch.setattr(kind, "is_cuda", property(lambda weight: weight.device.type == "meta"))


@pytest.mark.parametrize("quant", [None, *FORMATS])
@pytest.mark.parametrize("implementation", ["base", "sparse"])
@pytest.mark.parametrize("adapters", ADAPTERS)
@torch.no_grad()
def test_every_graph_of_every_network_runs_without_the_host(adapters, implementation, quant, meta_is_an_h100):
    args = CUTTABLE.replace(n_layers=1, **ADAPTERS[adapters])
    with torch.device("meta"):
        decoder = Decoder(args, implementation)
        add_adapters(decoder, adapter_specs_for(args))
    decoder.cast(torch.bfloat16).compute_in(torch.bfloat16)
    if quant is not None:
        quantize_skeleton(decoder, Quant.parse(quant))
    experts = decoder.layers[0].feed_forward.experts
    for sequences in GRAPH_BUCKETS:
        x_TD = torch.empty(sequences, args.dim, device="meta", dtype=torch.bfloat16)
        assert experts.host_free(x_TD, torch.empty(sequences, 2, device="meta"), adapted=False), sequences
