"""Attention over pages on a CPU, against the definition; what is in fp8, against what its rounding may cost."""

import pytest
import torch
from helpers.interpreted import relative
from helpers.paging import paged
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.ops import paged_attention as ops
from accessory.ops.attention import attention_reference
from accessory.ops.paged_attention import (
    PagedBatch,
    Pages,
    Span,
    causal_mask,
    copy_to_pages,
    paged_attention,
    paged_attention_reference,
)

MIXED = [(1, 70), (1, 1), (1, 192), (5, 133), (66, 66), (3, 64)]


@st.composite
def steps(draw):
    """(sequences, shared pages): single queries first, then chunks of prompts with and without earlier context."""
    shared = draw(st.integers(0, 2))
    context = st.integers(64 * shared, 64 * shared + 100)
    decodes = [(1, length + 1) for length in draw(st.lists(context, max_size=4))]
    chunks = st.tuples(st.integers(2, 70), context).map(lambda c: (c[0], c[0] + c[1]))
    prompts = draw(st.lists(chunks, min_size=0 if decodes else 1, max_size=3))
    return decodes + prompts, shared


@given(
    step=steps(),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 2), (9, 3), (8, 1)]),
    d=st.sampled_from([4, 16]),
    consecutive=st.booleans(),
    on_host=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_every_step_is_the_definition(step, heads, d, consecutive, on_host, seed):
    sequences, shared = step
    p = paged(sequences, *heads, d, consecutive=consecutive, shared=shared, seed=seed)
    batch = p.batch if on_host else p.batch._replace(spans=None)
    y = paged_attention(p.q_NHd, p.pages, batch, p.new)
    torch.testing.assert_close(y, paged_attention_reference(p.q_NHd, p.pages, batch), rtol=1e-5, atol=1e-5)


def test_the_definition_is_that_of_attention():
    sequences = [(1, 70), (1, 192), (5, 133), (3, 67)]
    p = paged(sequences, 6, 2, 8, shared=1)
    y = paged_attention_reference(p.q_NHd, p.pages, p.batch)
    first = 0
    for (n, length), (k, v) in zip(sequences, p.whole, strict=True):
        alone = attention_reference(
            p.q_NHd[None, first : first + n], k[None], v[None], causal_mask(n, length, "cpu")[None]
        )
        torch.testing.assert_close(y[first : first + n], alone[0])
        first += n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_stay_close_to_the_definition(dtype):
    p = paged(MIXED, 6, 2, 16, dtype=dtype, consecutive=True)
    want = paged_attention_reference(p.q_NHd.float(), p.pages, p.batch)
    assert relative(paged_attention(p.q_NHd, p.pages, p.batch), want) <= 1e-2


def test_a_batch_says_where_everything_lies():
    batch = PagedBatch.of([(1, 65, [7, 3]), (1, 1, [5]), (3, 130, [2, 9, 4])])
    assert batch.slot_N.tolist() == [3 * 64, 5 * 64, 9 * 64 + 63, 4 * 64, 4 * 64 + 1]
    assert batch.page_BP.tolist() == [[7, 3, 3], [5, 5, 5], [2, 9, 4]]
    assert batch.length_B.tolist() == [65, 1, 130]
    assert batch.query_C.tolist() == [0, 1, 2, 5]
    assert (batch.decodes, batch.longest, batch.longest_length, batch.fresh) == (2, 3, 130, False)
    assert PagedBatch.of([(1, 65, [7, 3]), (9, 9, [5])]).fresh


def test_consecutive_pages_are_read_where_they_lie():
    p = paged([(1, 100)], 2, 1, 4, consecutive=True)
    span = Span.of(0, 1, 100, [1, 2, 77])  # the third page is beyond the length
    assert span == Span(0, 1, 100, 64, None)
    k_LGd, _ = ops._keys_and_values(p.pages, 100, span.start, span.page_P, torch.float32)
    assert k_LGd.data_ptr() == p.pages.k_PSGd[1].data_ptr()
    assert torch.equal(k_LGd, p.whole[0][0])


def test_written_keys_are_where_the_batch_says():
    p = paged([(3, 66), (70, 70)], 4, 2, 8)
    empty = Pages(*(torch.full_like(t, torch.nan) for t in (p.pages.k_PSGd, p.pages.v_PSGd)))
    copy_to_pages(empty, p.batch.slot_N, *p.new)
    assert int(empty.k_WGd[:, 0, 0].isfinite().sum()) == 73  # and nothing else was touched
    assert torch.equal(empty.k_WGd[p.batch.slot_N], p.new[0])
    assert torch.equal(empty.v_WGd[p.batch.slot_N], p.new[1])


def test_fp8_costs_no_more_than_its_rounding():
    exact, p = (paged(MIXED, 6, 2, 32, fp8=fp8, seed=3) for fp8 in (False, True))
    want = paged_attention(exact.q_NHd, exact.pages, exact.batch)
    got = paged_attention(p.q_NHd, p.pages, p.batch)
    torch.testing.assert_close(got, paged_attention_reference(p.q_NHd, p.pages, p.batch), rtol=1e-5, atol=1e-5)
    assert 1e-3 < relative(got, want) < 0.06
    assert (got - want).abs().le(fp8_bound(exact) + 1e-6).all()


def fp8_bound(p):
    """The most that fp8 may move each output, (N, H, d).

    A number moves by 1/16 of itself at most, and by half of fp8's smallest step, 2⁻¹⁰ scales, where it is tiny. A score
    then moves by at most δ, and a probability by a factor between e^-2δ and e^2δ.
    """
    bound_NHd = torch.empty(p.q_NHd.shape)
    first = 0
    for b, (k_LGd, v_LGd) in enumerate(p.whole):
        n, L, R = int(p.batch.query_C.diff()[b]), len(k_LGd), p.q_NHd.shape[1] // k_LGd.shape[1]
        k, v, dk, dv = (t.repeat_interleave(R, 1) for t in (k_LGd, v_LGd, rounding(k_LGd), rounding(v_LGd)))
        q_THd = p.q_NHd[first : first + n]
        unseen_TL = ~causal_mask(n, L, "cpu")
        moves_HTL = torch.einsum("thd,lhd->htl", q_THd.abs(), dk) / q_THd.shape[-1] ** 0.5
        factor_HT1 = (2 * moves_HTL.masked_fill(unseen_TL, 0).amax(-1, keepdim=True)).exp()
        score_HTL = torch.einsum("thd,lhd->htl", q_THd, k) / q_THd.shape[-1] ** 0.5
        weight_HTL = score_HTL.masked_fill(unseen_TL, -torch.inf).softmax(-1)
        bound_HTd = (factor_HT1 - 1) * torch.einsum("htl,lhd->htd", weight_HTL, v.abs())
        bound_HTd += factor_HT1 * torch.einsum("htl,lhd->htd", weight_HTL, dv)
        bound_NHd[first : first + n] = bound_HTd.transpose(0, 1)
        first += n
    return bound_NHd


def rounding(x_LGd):
    return torch.maximum(x_LGd.abs() / 16, x_LGd.abs().amax(-1, keepdim=True) / 448 / 1024)
