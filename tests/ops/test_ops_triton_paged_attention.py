"""The kernels of the paged cache against the definition, in Triton's interpreter. tests/gpu runs them on a GPU."""

import pytest
import torch
from helpers.interpreted import interpret, relative
from helpers.paging import paged

from accessory.ops.paged_attention import Pages, copy_to_pages, paged_attention_reference

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")

CASES = {  # sequences, H, G, d: lengths that end in a page and with one, groups and head sizes that are no power of two
    "decodes": ([(1, 1), (1, 140), (1, 64), (1, 65)], 4, 1, 16),
    "a long decode": ([(1, 500)], 8, 8, 16),
    "mixed": ([(1, 70), (5, 5), (3, 200)], 8, 2, 32),
    "three heads a group": ([(1, 300), (1, 3), (9, 80)], 6, 2, 20),
    "large groups": ([(1, 90), (2, 3)], 32, 1, 16),
    "large heads": ([(1, 70), (4, 70)], 3, 1, 128),
    "a prompt of several tiles": ([(5, 5), (40, 100)], 4, 1, 16),
}


def check(name, device="cpu", dtype=torch.float32, bound=1e-6, fp8=False):
    """Compare written pages with torch's, and attention with the definition in fp32."""
    from accessory.ops.triton import paged_attention as kernels

    sequences, H, G, d = CASES[name]
    here = paged(sequences, H, G, d, dtype=dtype, fp8=fp8)
    p = here.to(device)
    written, wanted = (empty_like(pages) for pages in (p.pages, here.pages))
    kernels.write_pages(written, p.batch.slot_N, *p.new)
    copy_to_pages(wanted, here.batch.slot_N, *here.new)
    same_pages(written, wanted, exact=not fp8)
    want = paged_attention_reference(here.q_NHd.float(), here.pages, here.batch)
    got = kernels.attention(p.q_NHd, p.pages, p.batch)
    assert got.shape == p.q_NHd.shape
    assert got.dtype == dtype
    assert relative(got, want) <= bound, (name, relative(got, want))
    # Room for longer sequences, as in a CUDA graph: more splits than there are keys for.
    roomy = p.batch._replace(longest_length=12 * 64)
    assert relative(kernels.attention(p.q_NHd, p.pages, roomy), want) <= bound


def empty_like(pages):
    tensors = (pages.k_PSGd, pages.v_PSGd, pages.k_scale_PSG, pages.v_scale_PSG)
    return Pages(*(t if t is None else torch.full(t.shape, torch.nan, device=t.device).to(t.dtype) for t in tensors))


def same_pages(got, want, exact):
    for name in ("k_scale_PSG", "v_scale_PSG", "k_PSGd", "v_PSGd"):
        a, b = getattr(got, name), getattr(want, name)
        if b is None:
            continue
        a, b = a.cpu().float(), b.float()
        assert torch.equal(a.isnan(), b.isnan())
        if "scale" in name:
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-6, atol=0)
        elif exact:
            torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)
        else:
            # Division rounds otherwise on a GPU, so a number at a tie may go to its other neighbour. The interpreter
            # halves numbers that round up to a power of two.
            power = b.log2().frac() == 0 if not got.k_PSGd.is_cuda else torch.zeros_like(b, dtype=torch.bool)
            power |= (-b).log2().frac() == 0 if not got.k_PSGd.is_cuda else False
            known = ~(b.isnan() | power)
            assert (a[known] == b[known]).float().mean() >= 0.99
            assert ((a - b).abs() <= b.abs() / 8 + 2**-9)[known].all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
@pytest.mark.parametrize("fp8", [False, True])
def test_pages_in_the_interpreter(fp8):
    interpret(__file__, f"for name in t.CASES: t.check(name, fp8={fp8})")
