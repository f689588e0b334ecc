"""On a GPU, at Mixtral-8x7B's sizes: grouped products and adapters without the host, also inside a CUDA graph."""

import pytest
import torch
from helpers.generating import answers, engine_over
from helpers.interpreted import relative
from helpers.random_models import canonical_from_hf, decoder_from_canonical, hf_mixtral

from accessory.adapt.peft import adapter_specs_for, add_adapters
from accessory.config import ModelArgs, MoEArgs
from accessory.nn.experts_base import BaseExperts
from accessory.nn.experts_sparse import SparseExperts
from accessory.ops import dispatch
from accessory.ops.dense_products import grouped_loop, sort_by_expert
from accessory.ops.linear import AdapterRows, LinearAdapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
E, D, F = 8, 4096, 14336
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)]
BOTH = {"base": BaseExperts, "sparse": SparseExperts}


@pytest.fixture(autouse=True)
def exact_fp32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def captured(call):
    """A graph of `call`, and what it returns. The first call compiles the kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize(("dtype", "bound"), DTYPES, ids=str)
@pytest.mark.parametrize("size", [(F, D), (D, F)], ids=str)
@torch.no_grad()
def test_grouped_rows_at_real_sizes(dtype, bound, size):
    from accessory.ops.triton.grouped import product

    g = torch.Generator("cuda").manual_seed(0)
    w = (torch.randn(E, *size, generator=g, device="cuda") * 0.02).to(dtype)
    for rows in (2, 8, 16, 32, 64, 128, 512, 2048):
        x = torch.randn(rows, size[1], generator=g, device="cuda").to(dtype)
        _, count = sort_by_expert(torch.randint(0, E - 1, (rows, 1), generator=g, device="cuda"), E, first=1)
        held = int(count.sum())  # the last expert idles, and pairs of the first one are another rank's
        want = grouped_loop(x.float(), w.float(), count)[:held]
        assert relative(product(x, w, count)[:held], want) <= bound, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_grouped_product_in_a_graph_follows_the_routing(dtype):
    from accessory.ops.triton.grouped import product

    g = torch.Generator("cuda").manual_seed(0)
    w = (torch.randn(E, 512, D, generator=g, device="cuda") * 0.02).to(dtype)
    x = torch.randn(48, D, generator=g, device="cuda").to(dtype)
    count = torch.tensor([48, 0, 0, 0, 0, 0, 0, 0], device="cuda")
    graph, got = captured(lambda: product(x, w, count))
    for counts in ([6] * 8, [0, 0, 48, 0, 0, 0, 0, 0], [1, 40, 0, 0, 3, 0, 0, 4], [0, 2, 0, 5, 0, 0, 0, 1]):
        count.copy_(torch.tensor(counts))
        graph.replay()
        held = sum(counts)
        assert torch.equal(got[:held], product(x, w, count)[:held])
        assert relative(got[:held], grouped_loop(x.float(), w.float(), count)[:held]) <= 4e-3


def experts_of(kind, dtype, adapted, first=0, held=E, dim=512, hidden=768):
    """Random experts; with LoRA and biases beside them if `adapted`."""
    experts = BOTH[kind](dim, hidden, held, **({"first": first} if kind == "base" else {}))
    for name in ("w1", "w2", "w3") if adapted else ():
        experts.add_bias(name)
        experts.add_lora(name, 6, 0.5)
    g = torch.Generator().manual_seed(3)
    for p in experts.parameters():
        p.data = (torch.randn(p.shape, generator=g) * 0.05).to(dtype)
    return experts.requires_grad_(False)


@pytest.mark.parametrize(("dtype", "bound"), DTYPES, ids=str)
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("kind", "first", "held"), [("base", 0, 8), ("base", 3, 4), ("base", 7, 1), ("sparse", 0, 8)])
@pytest.mark.parametrize("tokens", [1, 4, 5, 40])
@torch.no_grad()
def test_experts_in_a_graph_are_the_loop_on_a_cpu(dtype, bound, adapted, kind, first, held, tokens):
    """Captures once, and replays with other inputs and other routings. The oracle is the loop, in fp64 on the CPU."""
    here = experts_of(kind, dtype, adapted, first, held)
    oracle = experts_of(kind, dtype, adapted, first, held).double()
    there = here.cuda()
    x = torch.zeros(tokens, 512, device="cuda", dtype=dtype)
    weight, expert = torch.zeros(tokens, 2, device="cuda"), torch.zeros(tokens, 2, dtype=torch.int64, device="cuda")
    assert there.host_free(x, expert, adapted=False)
    expert[:, 1] = 1
    graph, got = captured(lambda: there(x, weight, expert))
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        x.copy_(torch.randn(tokens, 512, generator=g))
        weight.copy_(torch.rand(tokens, 2, generator=g))
        expert.copy_(torch.stack([torch.randperm(E, generator=g)[:2] for _ in range(tokens)]))
        graph.replay()
        want = oracle(x.cpu().double(), weight.cpu(), expert.cpu())
        assert relative(got, want) <= 3 * bound


@pytest.mark.parametrize(("dtype", "bound"), DTYPES, ids=str)
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("tokens", [2, 20, 80])
@torch.no_grad()
def test_several_adapters_in_a_graph(dtype, bound, kind, tokens):
    """Each token has its own adapter or none: pair by pair, row by row, and grouped. Replays with other adapters."""
    g = torch.Generator().manual_seed(1)

    def lora(rank, out, into):
        return LinearAdapter(
            torch.randn(E, rank, into, generator=g) * 0.05, torch.randn(E, out, rank, generator=g) * 0.05, 2.0
        )

    sizes = {"w1": (768, 512), "w2": (512, 768), "w3": (768, 512)}
    loras = {name: [lora(4, *s), None if name == "w1" else lora(16, *s), lora(7, *s)] for name, s in sizes.items()}
    there, oracle = experts_of(kind, dtype, False).cuda(), experts_of(kind, dtype, False).double()
    for name, several in loras.items():
        rounded = [None if a is None else LinearAdapter(a.a.to(dtype), a.b.to(dtype), a.scale) for a in several]
        there.set_adapters(
            name, [None if a is None else LinearAdapter(a.a.cuda(), a.b.cuda(), a.scale) for a in rounded]
        )
        oracle.set_adapters(
            name, [None if a is None else LinearAdapter(a.a.double(), a.b.double(), a.scale) for a in rounded]
        )
    x = torch.randn(tokens, 512, generator=g).to("cuda", dtype)
    weight = torch.rand(tokens, 2, generator=g).cuda()
    expert = torch.stack([torch.randperm(E, generator=g)[:2] for _ in range(tokens)]).cuda()
    adapter = torch.full((tokens,), -1, device="cuda")
    assert there.host_free(x, expert, adapted=True)
    graph, got = captured(lambda: there(x, weight, expert, AdapterRows(adapter, 3)))
    for seed in range(3):
        adapter.copy_(torch.randint(-1, 3, (tokens,), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        want = oracle(x.cpu().double(), weight.cpu(), expert.cpu(), AdapterRows(adapter.cpu(), 3))
        assert relative(got, want) <= 3 * bound


ARGS = ModelArgs(
    dim=128, hidden_dim=224, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=512, max_seq_len=256, moe=MoEArgs(),
    lora_rank=4, lora_alpha=8.0, bias_tuning=True,
)  # fmt: skip


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 7])
def test_generation_has_graphs_with_adapters_and_in_every_dtype(implementation, adapted, dtype, batch):
    decoder = decoder_from_canonical(ARGS, implementation, canonical_from_hf(hf_mixtral(ARGS, std=0.2)), dtype)
    if adapted:
        add_adapters(decoder, adapter_specs_for(ARGS), ARGS.lora_scale)
        g = torch.Generator().manual_seed(5)
        for name, p in decoder.named_parameters():
            if "lora" in name or "bias" in name:
                p.data.copy_(torch.randn(p.shape, generator=g) * 0.02)
    decoder.requires_grad_(False).cuda()
    prompts = [[1, 5, 9 + n, 30] for n in range(batch)]
    # A graph of more rows takes other products. In 16 bits they round otherwise, and later tokens may differ.
    compared = 8 if dtype == torch.float32 else 2
    plain, graphed = (
        [ids[:compared] for ids in answers(engine_over(decoder, graphs=graphs, max_seq_len=64), prompts, 8)]
        for graphs in (False, True)
    )
    assert graphed == plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_training_keeps_products_with_gradients(dtype):
    w = torch.randn(4, 24, 16, device="cuda", dtype=dtype, requires_grad=True)
    x = torch.randn(9, 16, device="cuda", dtype=dtype, requires_grad=True)
    assert dispatch.choose(dispatch.product("grouped", x, w, 9)).function == "dense_products:grouped_loop"
