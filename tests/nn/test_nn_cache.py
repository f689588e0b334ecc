"""The paged cache in the network: any division of texts into steps gives what the whole text at once gives."""

import pytest
import torch
from helpers.paging import table
from helpers.sizes import TINY

from accessory.nn.cache import PagedCache, bytes_a_page
from accessory.nn.decoder import Decoder, init_weights
from accessory.ops.paged_attention import PagedBatch

ARGS = TINY.replace(n_heads=6, head_dim=8, vocab_size=97, max_seq_len=512)


@pytest.fixture(params=["base", "sparse"])
def decoder(request):
    decoder = Decoder(ARGS, request.param).eval()
    init_weights(decoder, std=0.2)
    return decoder.requires_grad_(False)


def run(decoder, texts, steps, cache, tables):
    """Logits of each text, run in `steps`: in each, how many tokens of each text."""
    done, logits = [0] * len(texts), [[] for _ in texts]
    for counts in steps:
        # Those with one token come first.
        order = sorted((b for b, n in enumerate(counts) if n), key=lambda b: counts[b] > 1)
        parts = {b: range(done[b], done[b] + counts[b]) for b in order}
        cache.begin(PagedBatch.of([(counts[b], parts[b].stop, tables[b]) for b in order]))
        tokens_1N = torch.cat([texts[b][list(parts[b])] for b in order])[None]
        positions_1N = torch.cat([torch.tensor(parts[b]) for b in order])[None]
        out = decoder(tokens_1N, positions_1N, cache=cache).logits[0].split([counts[b] for b in order])
        for b, part in zip(order, out, strict=True):
            logits[b].append(part)
            done[b] += counts[b]
    return [torch.cat(parts) for parts in logits]


STEPS = {
    "one token at a time": [(1,)] * 70,
    "whole, then one at a time": [(64,), *[(1,)] * 6],
    "chunks": [(3,), (60,), (1,), (6,)],
    "texts side by side": [(20, 0, 3), (1, 66, 1), (1, 1, 5), (47, 1, 1), (1, 2, 0)],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("consecutive", [True, False])
def test_any_steps_give_the_whole_at_once(decoder, steps, consecutive):
    texts = [torch.randint(0, 97, (sum(counts),)) for counts in zip(*steps, strict=True)]
    tables = table([len(t) for t in texts], consecutive=consecutive, seed=4)
    cache = PagedCache(ARGS, 1 + sum(map(len, tables)), "cpu", torch.float32)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    for text, logits in zip(texts, run(decoder, texts, steps, cache, tables), strict=True):
        torch.testing.assert_close(logits, decoder(text[None]).logits[0], rtol=1e-5, atol=1e-5)


def test_a_text_goes_on_from_pages_that_another_wrote(decoder):
    start, rest = torch.randint(0, 97, (64,)), torch.randint(0, 97, (2, 9))
    cache = PagedCache(ARGS, 6, "cpu", torch.float32)
    run(decoder, [start], [(64,)], cache, [[3]])
    cache.begin(PagedBatch.of([(9, 73, [3, 5]), (9, 73, [3, 1])]))
    positions = torch.arange(64, 73).expand(2, 9).reshape(1, 18)
    logits = decoder(rest.reshape(1, 18), positions, cache=cache).logits[0].view(2, 9, -1)
    for part, text in zip(logits, rest, strict=True):
        whole = decoder(torch.cat([start, text])[None]).logits[0, 64:]
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)


def test_fp8_stays_near(decoder):
    text = torch.randint(0, 97, (100,))
    cache = PagedCache(ARGS, 3, "cpu", torch.float32, fp8=True)
    logits = run(decoder, [text], [(70,), *[(1,)] * 30], cache, [[2, 1]])[0]
    whole = decoder(text[None]).logits[0]
    # Rounding may send a token to another expert; such tokens are few.
    error_T = (logits - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert 1e-4 < error_T.median() < 0.05


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_arithmetic_of_a_page(dtype, fp8):
    cache = PagedCache(ARGS, 5, "cpu", dtype, kv_heads=1, fp8=fp8)
    tensors = [cache.k, cache.v]
    for pages in cache._layers:
        tensors += [t for t in (pages.k_scale_PSG, pages.v_scale_PSG) if t is not None]
    assert sum(t.nbytes for t in tensors) == 5 * bytes_a_page(ARGS, 1, dtype, fp8)
