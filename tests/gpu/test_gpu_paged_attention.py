"""On a GPU: the kernels of the paged cache against the definition, in CUDA graphs too; the network with the cache."""

import pytest
import torch
from helpers.interpreted import relative
from helpers.paging import KERNEL_CASES, check_kernels, paged, table

from accessory.config import ModelArgs, MoEArgs
from accessory.nn.cache import PagedCache
from accessory.nn.decoder import Decoder, init_weights
from accessory.ops.attention import has_varlen
from accessory.ops.paged_attention import PagedBatch, paged_attention, paged_attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# fp32 products are fp32's own ("ieee"). In 16 bits, probabilities and outputs are rounded.
BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
MIXTRAL = (32, 8, 128)
MIXTRAL_CASES = {
    "decodes": ([(1, 1), (1, 140), (1, 2048), (1, 64), (1, 5000)], *MIXTRAL),
    "a decode far beyond one split": ([(1, 20_000)], *MIXTRAL),
    "many decodes": ([(1, 60 * n + 1) for n in range(48)], *MIXTRAL),
    "chunks, prompts and decodes": ([(1, 700), (300, 1500), (513, 513), (2, 129), (64, 3000)], *MIXTRAL),
    "few queries on a long context": ([(16, 5000)], *MIXTRAL),
}
OTHER_CASES = KERNEL_CASES | {
    "the demo's heads": ([(1, 300), (1, 1), (200, 333)], 9, 3, 64),
    "eight heads a group": ([(1, 300), (100, 400)], 16, 2, 128),
    "heads of 256": ([(1, 300), (70, 100)], 8, 2, 256),
}


@pytest.mark.parametrize("case", MIXTRAL_CASES.values(), ids=MIXTRAL_CASES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("fp8", [False, True])
def test_kernels_are_the_definition(case, dtype, fp8):
    # Products of fp16 with fp8 run in bf16.
    bound = BOUNDS[torch.bfloat16 if fp8 and dtype == torch.float16 else dtype]
    check_kernels(case, device="cuda", dtype=dtype, bound=bound, fp8=fp8)


@pytest.mark.parametrize("case", OTHER_CASES.values(), ids=OTHER_CASES)
@pytest.mark.parametrize("fp8", [False, True])
def test_kernels_of_other_sizes(case, fp8):
    check_kernels(case, device="cuda", dtype=torch.bfloat16, bound=BOUNDS[torch.bfloat16], fp8=fp8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fresh_prompts_take_the_kernel_for_packed_rows(dtype):
    here = paged([(1, 70), (1, 500), (300, 300), (20, 20)], *MIXTRAL, dtype=dtype)
    assert here.batch.fresh
    assert has_varlen(torch.device("cuda"), dtype)
    p = here.to("cuda")
    p.pages.k_WGd[p.batch.slot_N[2:]] = torch.nan  # so the prompts' keys are not read here
    want = paged_attention_reference(here.q_NHd.float(), here.pages, here.batch)
    assert relative(paged_attention(p.q_NHd, p.pages, p.batch, p.new), want) <= BOUNDS[dtype]


@pytest.mark.parametrize("fp8", [False, True])
def test_one_graph_serves_all_lengths_and_pages(fp8):
    """Captures a layer's step once and replays it over other sequences, with padding on page 0."""
    H, G, d = MIXTRAL
    B, P = 4, 40
    args = ModelArgs(
        dim=64, hidden_dim=64, n_layers=1, n_heads=H, n_kv_heads=G, head_dim=d, vocab_size=8, max_seq_len=8
    )
    first = paged([(1, 5)] * B, H, G, d, dtype=torch.bfloat16, fp8=fp8).to("cuda")
    static = PagedBatch(
        slot_N=torch.zeros(B, dtype=torch.int64, device="cuda"),
        page_BP=torch.zeros(B, P, dtype=torch.int32, device="cuda"),
        length_B=torch.ones(B, dtype=torch.int32, device="cuda"),
        query_C=torch.arange(B + 1, dtype=torch.int32, device="cuda"),
        decodes=B,
        longest=0,
        longest_length=P * 64,
    )
    cache = PagedCache(args, 200, "cuda", torch.bfloat16, fp8=fp8)
    for layer in cache._layers:  # slot 63 of page 0 stays NaN
        for pool in (layer.k_PSGd, layer.v_PSGd, layer.k_scale_PSG, layer.v_scale_PSG):
            if pool is not None:
                pool.copy_(torch.full(pool.shape, torch.nan, device="cuda"))
    cache.begin(static)
    q, (k, v) = first.q_NHd.contiguous(), [t.clone() for t in first.new]
    turn_not = torch.ones(B, 1, d // 2, dtype=torch.complex64, device="cuda")
    cache.attend(0, q, k, v, turn_not)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cache.attend(0, q, k, v, turn_not)
    for seed, lengths in enumerate([(1, 64, 65, 130), (2500, 7, 1), (2560, 2559, 640, 3), (200,)]):
        n = len(lengths)
        p = paged([(1, length) for length in lengths], H, G, d, dtype=torch.bfloat16, fp8=fp8, seed=seed).to("cuda")
        count = len(p.pages.k_PSGd)
        pools = [
            (layer.k_PSGd, layer.v_PSGd, layer.k_scale_PSG, layer.v_scale_PSG) for layer in (cache._layers[0], p.pages)
        ]
        for mine, theirs in zip(*pools, strict=True):
            if mine is not None:
                mine[:count] = theirs
                # The step writes its own keys and values: what lay there must not matter.
                for slot in p.batch.slot_N.tolist():
                    mine.flatten(0, 1)[slot] = mine[0, 63]
        for buffer, padding in zip(static[:3], (0, 0, 1), strict=True):
            buffer.fill_(padding)
        static.slot_N[:n], static.length_B[:n] = p.batch.slot_N, p.batch.length_B
        static.page_BP[:n, : p.batch.page_BP.shape[1]] = p.batch.page_BP
        q[:n], k[:n], v[:n] = p.q_NHd, *p.new
        graph.replay()
        # In fp8 a number at a tie may be written otherwise than by torch, so what was written is compared with.
        pages = cache._layers[0] if fp8 else p.pages
        want = paged_attention_reference(p.q_NHd.float(), pages, p.batch)
        assert relative(y[:n], want) <= BOUNDS[torch.bfloat16]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@torch.inference_mode()
def test_the_network_in_steps_gives_the_whole_at_once(dtype, bound):
    moe = MoEArgs(num_experts=1, num_experts_per_tok=1)  # rounding cannot send a token elsewhere
    args = ModelArgs(
        dim=128, hidden_dim=224, n_layers=3, n_heads=8, n_kv_heads=2, vocab_size=512, max_seq_len=512, moe=moe
    )
    decoder = Decoder(args, "sparse").cast(dtype).cuda()
    init_weights(decoder)
    texts = torch.randint(0, 512, (2, 200), generator=torch.Generator().manual_seed(0)).cuda()
    tables = table([200, 200])
    cache = PagedCache(args, 9, "cuda", dtype)
    done, parts = [0, 0], ([], [])
    for counts in ((150, 40), (1, 100), (1, 1), (48, 59)):
        order = sorted((0, 1), key=lambda b: counts[b] > 1)
        cache.begin(PagedBatch.of([(counts[b], done[b] + counts[b], tables[b]) for b in order], "cuda"))
        positions = torch.cat([torch.arange(done[b], done[b] + counts[b], device="cuda") for b in order])
        tokens = torch.cat([texts[b, done[b] : done[b] + counts[b]] for b in order])
        logits = decoder(tokens[None], positions[None], cache=cache).logits[0]
        for b, part in zip(order, logits.split([counts[b] for b in order]), strict=True):
            parts[b].append(part)
            done[b] += counts[b]
    for text, logits in zip(texts, parts, strict=True):
        assert relative(torch.cat(logits), decoder(text[None]).logits[0]) <= bound
