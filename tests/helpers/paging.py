"""Paged caches filled at random, for tests of attention over pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.limits import PAGE_SIZE
from accessory.ops.paged_attention import PagedBatch, Pages, copy_to_pages, paged_attention_reference
from accessory.ops.rope import apply_rope, rope_frequencies, rotations
from helpers.interpreted import relative


class Paged(NamedTuple):
    """A step over sequences whose keys and values lie in pages. Unused slots hold NaN."""

    q_NHd: Tensor
    pages: Pages
    batch: PagedBatch
    new: tuple[Tensor, Tensor]  # the new tokens' keys and values, (N, G, d)
    whole: list[tuple[Tensor, Tensor]]  # each sequence's keys and values, (L, G, d), not rounded to fp8

    def to(self, device: str) -> Paged:
        pages, batch = self.pages, self.batch
        tensors = (pages.k_PSGd, pages.v_PSGd, pages.k_scale_PSG, pages.v_scale_PSG)
        there = Pages(*(t if t is None else t.to(device) for t in tensors))
        moved = (t.to(device) for t in batch[:4])
        fields = dict(zip(batch._fields, moved, strict=False))
        return Paged(
            self.q_NHd.to(device),
            there,
            batch._replace(**fields, spans=batch.spans if device == "cpu" else None),
            (self.new[0].to(device), self.new[1].to(device)),
            self.whole,
        )


def table(lengths: Sequence[int], *, consecutive: bool = False, shared: int = 0, seed: int = 0) -> list[list[int]]:
    """Pages for sequences of these lengths, from page 1 on. `shared`: so many first pages belong to all of them."""
    needs = [-(-length // PAGE_SIZE) for length in lengths]
    order = torch.arange(1, sum(needs) + 1)
    if not consecutive:
        order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]
    tables = [part.tolist() for part in order.split(needs)]
    return [tables[0][:shared] + pages[shared:] for pages in tables]


def paged(
    sequences: Sequence[tuple[int, int]],
    H: int,
    G: int,
    d: int,
    *,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    consecutive: bool = False,
    shared: int = 0,
    seed: int = 0,
) -> Paged:
    """A step over `sequences`, (queries, length) each, with random numbers. Shared pages must be full in all."""
    g = torch.Generator().manual_seed(seed)
    tables = table([length for _, length in sequences], consecutive=consecutive, shared=shared, seed=seed)
    batch = PagedBatch.of([(n, length, pages) for (n, length), pages in zip(sequences, tables, strict=True)])
    shape = (1 + max(map(max, tables)), PAGE_SIZE, G, d)
    pools = [torch.full(shape, torch.nan).to(torch.float8_e4m3fn if fp8 else dtype) for _ in range(2)]
    scales = [torch.full(shape[:-1], torch.nan) for _ in range(2)] if fp8 else []
    pages = Pages(*pools, *scales)
    whole: list[tuple[Tensor, Tensor]] = []
    for (_, length), mine in zip(sequences, tables, strict=True):
        k_LGd, v_LGd = (torch.randn(length, G, d, generator=g).to(dtype) for _ in range(2))
        if whole:
            for t_LGd, first_LGd in zip((k_LGd, v_LGd), whole[0], strict=True):
                t_LGd[: shared * PAGE_SIZE] = first_LGd[: shared * PAGE_SIZE]
        slot_L = torch.tensor([mine[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in range(length)])
        copy_to_pages(pages, slot_L, k_LGd, v_LGd)
        whole.append((k_LGd, v_LGd))
    new_k, new_v = (
        torch.cat([kv[i][len(kv[i]) - n :] for (n, _), kv in zip(sequences, whole, strict=True)]) for i in (0, 1)
    )
    # As the decoder makes them: queries and keys are parts of one tensor.
    q_NHd = torch.randn(len(new_k), H + G, d, generator=g).to(dtype)[:, :H]
    return Paged(q_NHd, pages, batch, (new_k, new_v), whole)


# (sequences, H, G, d) for the kernels: lengths that end in a page and with one; groups and heads of odd sizes.
KERNEL_CASES = {
    "decodes": ([(1, 1), (1, 140), (1, 64), (1, 65)], 4, 1, 16),
    "a long decode": ([(1, 500)], 2, 2, 16),
    "mixed": ([(1, 70), (5, 5), (3, 200)], 8, 2, 32),
    "three heads a group": ([(1, 130), (1, 3), (9, 80)], 6, 2, 20),
    "large groups": ([(1, 90), (2, 3)], 32, 1, 16),
    "large heads": ([(1, 70), (4, 70)], 3, 1, 128),
    "a prompt of several tiles": ([(5, 5), (40, 100)], 4, 1, 16),
}


def check_kernels(
    case: tuple[Sequence[tuple[int, int]], int, int, int],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    bound: float = 1e-6,
    fp8: bool = False,
) -> None:
    """Compare written pages with those of torch, and attention with the definition in fp32."""
    from accessory.ops.triton import paged_attention as kernels

    sequences, H, G, d = case
    here = paged(sequences, H, G, d, dtype=dtype, fp8=fp8)
    p = here.to(device)
    written, wanted = (unwritten(pages) for pages in (p.pages, here.pages))
    rotation_N1c = rotations(torch.arange(len(p.q_NHd)) * 7 % 99, rope_frequencies(d, 1e4)[0])
    turned = kernels.rotate_and_write(written, p.batch.slot_N, p.q_NHd, *p.new, rotation_N1c.to(device))
    for got, want in zip(turned, apply_rope(here.q_NHd[None], here.new[0][None], rotation_N1c[None]), strict=True):
        torch.testing.assert_close(got.cpu(), want[0], rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)
    # The pages have what the kernel returns, or its rounding to fp8.
    copy_to_pages(wanted, here.batch.slot_N, turned[1].cpu(), here.new[1])
    same_pages(written, wanted, exact=not fp8)
    want = paged_attention_reference(here.q_NHd.float(), here.pages, here.batch)
    # As it is, and with room for longer sequences, as in a CUDA graph: more splits than there are keys for.
    for batch in (p.batch, p.batch._replace(longest_length=p.batch.longest_length + 12 * PAGE_SIZE)):
        got = kernels.attention(p.q_NHd, p.pages, batch)
        assert (got.shape, got.dtype) == (p.q_NHd.shape, dtype)
        error = relative(got, want)
        assert error <= bound, f"{case}: {error}"
    if p.batch.decodes < len(sequences):
        got = kernels.attention(F.pad(p.q_NHd, (0, 0, 0, 0, 0, 37)), p.pages, padded(p.batch, 37))[: len(p.q_NHd)]
        error = relative(got, want)
        assert error <= bound, f"{case}, padded: {error}"


def padded(batch: PagedBatch, more: int) -> PagedBatch:
    """The batch with room for longer prompts, and behind them two empty ones and one of so many tokens."""
    N = int(batch.query_C[-1])
    return batch._replace(
        page_BP=F.pad(batch.page_BP, (0, 3, 0, 3)),
        length_B=torch.cat([batch.length_B, batch.length_B.new_tensor([1, 1, more])]),
        query_C=torch.cat([batch.query_C, batch.query_C.new_tensor([N, N, N + more])]),
        longest=batch.longest + more + 100,
        longest_length=(batch.page_BP.shape[1] + 3) * PAGE_SIZE,
        fresh=False,
        padded=True,
    )


def unwritten(pages: Pages) -> Pages:
    tensors = (pages.k_PSGd, pages.v_PSGd, pages.k_scale_PSG, pages.v_scale_PSG)
    return Pages(*(t if t is None else torch.full(t.shape, torch.nan, device=t.device).to(t.dtype) for t in tensors))


def same_pages(got: Pages, want: Pages, *, exact: bool) -> None:
    for name in ("k_scale_PSG", "v_scale_PSG", "k_PSGd", "v_PSGd"):
        if getattr(want, name) is None:
            continue
        a, b = getattr(got, name).cpu().float(), getattr(want, name).float()
        assert torch.equal(a.isnan(), b.isnan()), name
        if exact or "scale" in name:
            torch.testing.assert_close(a, b, equal_nan=True, rtol=0 if exact else 1e-6, atol=0)
            continue
        # A GPU divides less exactly, so a number near a tie may go to its other neighbour. The interpreter halves
        # numbers that round up to a power of two.
        known = ~b.isnan()
        if not got.k_PSGd.is_cuda:
            known &= b.abs().log2().frac() != 0
        other = a[known] != b[known]
        assert other.sum() <= max(2, 0.01 * other.numel()), name  # a page with a single new token has few numbers
        assert ((a[known] - b[known]).abs() <= b[known].abs() / 8 + 2**-9).all(), name  # a neighbour: 3 bits, or 2^-9
        assert ((a - b).abs() <= b.abs() / 8 + 2**-9)[known].all()
