"""Attention over pages: the keys and values of a sequence lie in pages of 64 tokens, anywhere in a pool.

The tokens of a step are flat: the new tokens of one sequence after those of another. Each is a query, and its key and
value are written before any query looks. Full pages may belong to several sequences. Nothing here records gradients.

Legend: N new tokens of all sequences, B sequences, C = B + 1, P pages of the pool or of one sequence, S = 64 tokens of
a page, L keys of one sequence, T queries of one sequence, H query heads, G key/value heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.limits import PAGE_SIZE
from accessory.ops import dispatch
from accessory.ops.attention import attention, attention_reference
from accessory.ops.fp8 import to_fp8_rows
from accessory.ops.rope import apply_rope


class Pages:
    """The pool of one layer. In fp8, each vector of d numbers has an fp32 scale: k ≈ number · scale."""

    def __init__(
        self, k_PSGd: Tensor, v_PSGd: Tensor, k_scale_PSG: Tensor | None = None, v_scale_PSG: Tensor | None = None
    ) -> None:
        self.k_PSGd, self.v_PSGd, self.k_scale_PSG, self.v_scale_PSG = k_PSGd, v_PSGd, k_scale_PSG, v_scale_PSG
        self.fp8 = k_scale_PSG is not None
        self.device = k_PSGd.device
        # Views made once: decoding on a CPU would otherwise make them anew in every layer. W = P · S.
        self.k_WGd, self.v_WGd = k_PSGd.flatten(0, 1), v_PSGd.flatten(0, 1)
        self.k_1GWd, self.v_1GWd = self.k_WGd.transpose(0, 1)[None], self.v_WGd.transpose(0, 1)[None]


class Span(NamedTuple):
    """One sequence of a step, on the host."""

    first: int  # its first query
    queries: int
    length: int  # its keys, the new ones included
    start: int | None  # where its keys begin in the pool, if its pages are consecutive numbers
    page_P: Tensor | None  # else its pages, int64

    @classmethod
    def of(cls, first: int, queries: int, length: int, pages: Sequence[int]) -> Span:
        """`pages` are CPU numbers, in the order of the sequence; those beyond its length do not matter."""
        used = list(pages[: -(-length // PAGE_SIZE)])
        if used == list(range(used[0], used[0] + len(used))):
            return cls(first, queries, length, used[0] * PAGE_SIZE, None)
        return cls(first, queries, length, None, torch.tensor(used))


class PagedBatch(NamedTuple):
    """What the queries of one step may look at.

    Query i of a sequence with n queries and length L sees the keys 0 … L - n + i. The numbers are known to the host
    without asking the device, so a CUDA graph keeps them and reads other tensors in every replay.
    """

    slot_N: Tensor  # int64: where each new token's key and value go, page · 64 + offset
    page_BP: Tensor  # int32: each sequence's pages, in order; entries beyond its length are any pages of the pool
    length_B: Tensor  # int32: keys of each sequence, the new ones included; at least 1
    query_C: Tensor  # int32: the first query of each sequence, then N
    decodes: int  # the first `decodes` sequences have one query each
    longest: int  # the most queries of one of the other sequences; 0 if there are none
    longest_length: int  # no sequence has more keys; in a graph, what page_BP has room for
    fresh: bool = False  # whether the other sequences have no earlier context: as many keys as queries
    padded: bool = False  # whether most of the other sequences may be empty: a graph has room for many
    spans: Sequence[Span] | None = None  # the same on the host, where the device is a CPU

    @classmethod
    def of(cls, sequences: Sequence[tuple[int, int, Sequence[int]]], device: torch.device | str = "cpu") -> PagedBatch:
        """The batch of (queries, length, pages), a tuple each sequence. Those with one query come first."""
        device = torch.device(device)
        queries_B, length_B = [n for n, _, _ in sequences], [length for _, length, _ in sequences]
        decodes = next((b for b, n in enumerate(queries_B) if n > 1), len(sequences))
        used = [list(pages[: -(-length // PAGE_SIZE)]) for _, length, pages in sequences]
        width = max(map(len, used))
        page_BP = torch.tensor([pages + [pages[-1]] * (width - len(pages)) for pages in used], dtype=torch.int32)
        query_C = torch.tensor([0, *queries_B], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        positions = [torch.arange(length - n, length) for n, length in zip(queries_B, length_B, strict=True)]
        slots = [
            page_P[at // PAGE_SIZE].long() * PAGE_SIZE + at % PAGE_SIZE
            for page_P, at in zip(page_BP, positions, strict=True)
        ]
        return cls(
            slot_N=torch.cat(slots).to(device),
            page_BP=page_BP.to(device),
            length_B=torch.tensor(length_B, dtype=torch.int32).to(device),
            query_C=query_C.to(device),
            decodes=decodes,
            longest=max(queries_B[decodes:], default=0),
            longest_length=max(length_B),
            fresh=queries_B[decodes:] == length_B[decodes:],
            spans=[Span.of(*sequence) for sequence in zip(query_C.tolist(), queries_B, length_B, used, strict=False)]
            if device.type == "cpu"
            else None,
        )


Write = Callable[[Pages, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Attend = Callable[[Tensor, Pages, PagedBatch, tuple[Tensor, Tensor] | None], Tensor]


@lru_cache
def _kernel(op: dispatch.Op, device: torch.device, dtype: torch.dtype, fp8: bool, fixed: dispatch.Fixed) -> Any:
    assert fixed == dispatch.fixed(), "the product asks there"
    return dispatch.choose(dispatch.over_pages(op, device, dtype, fp8)).load()


def runs_host_free(device: torch.device, dtype: torch.dtype, fp8: bool) -> bool:
    """Whether `paged_attention` reads lengths and pages on the device alone. A CUDA graph needs that."""
    return dispatch.choose(dispatch.over_pages("attention", device, dtype, fp8)).host_free


def rotate_and_write(
    pages: Pages, slot_N: Tensor, q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, rotation_N1c: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate the queries and keys of new tokens, and write keys and values to their slots. Returns the rotated ones.

    They are rounded to fp8 where the pool is.

    rotation_N1c: `ops.rope.rotations` of the tokens' positions.
    """
    write: Write = _kernel("rotate_and_write", k_NGd.device, k_NGd.dtype, pages.fp8, dispatch.fixed())
    return write(pages, slot_N, q_NHd, k_NGd, v_NGd, rotation_N1c)


def paged_attention(q_NHd: Tensor, pages: Pages, batch: PagedBatch, new: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """softmax(q kᵀ/√d) v over each query's own sequence: (N, H, d) in q's dtype.

    The new keys and values are in `pages` already. `new`: the same as (N, G, d) each, as they were written; prompts
    without earlier context may read them there.
    """
    attend: Attend = _kernel("attention", q_NHd.device, q_NHd.dtype, pages.fp8, dispatch.fixed())
    return attend(q_NHd, pages, batch, new)


def rotate_and_copy(
    pages: Pages, slot_N: Tensor, q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, rotation_N1c: Tensor
) -> tuple[Tensor, Tensor]:
    """`rotate_and_write` with torch's operations."""
    q_NHd, k_NGd = apply_rope(q_NHd, k_NGd, rotation_N1c)
    copy_to_pages(pages, slot_N, k_NGd, v_NGd)
    return q_NHd, k_NGd


def copy_to_pages(pages: Pages, slot_N: Tensor, k_NGd: Tensor, v_NGd: Tensor) -> None:
    """Keys and values to their slots."""
    if not pages.fp8:
        pages.k_WGd.index_copy_(0, slot_N, k_NGd)
        pages.v_WGd.index_copy_(0, slot_N, v_NGd)
        return
    for x_NGd, pool_WGd, scale_PSG in (
        (k_NGd, pages.k_WGd, pages.k_scale_PSG),
        (v_NGd, pages.v_WGd, pages.v_scale_PSG),
    ):
        assert scale_PSG is not None
        number_NGd, scale_NG1 = to_fp8_rows(x_NGd)
        # torch copies no rows of fp8 numbers, so they are copied as bytes.
        pool_WGd.view(torch.uint8).index_copy_(0, slot_N, number_NGd.view(torch.uint8))
        scale_PSG.flatten(0, 1).index_copy_(0, slot_N, scale_NG1.squeeze(-1))


def sequence_by_sequence(
    q_NHd: Tensor, pages: Pages, batch: PagedBatch, new: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """`paged_attention` with torch's kernel, one sequence after the other."""
    N, H, d = q_NHd.shape
    G = pages.k_WGd.shape[1]
    parts = []
    for first, T, L, start, page_P in _read_spans(batch) if batch.spans is None else batch.spans:
        q_THd = q_NHd if T == N else q_NHd.narrow(0, first, T)
        if T == 1 and start is not None and not pages.fp8:
            # What `attention` would do, with fewer views: this runs in every layer of every token.
            k_1GLd, v_1GLd = pages.k_1GWd.narrow(2, start, L), pages.v_1GWd.narrow(2, start, L)
            y_1GRd = F.scaled_dot_product_attention(q_THd.reshape(1, G, H // G, d), k_1GLd, v_1GLd)
            parts.append(y_1GRd.reshape(1, H, d))
        else:
            k_LGd, v_LGd = _keys_and_values(pages, L, start, page_P, q_NHd.dtype)
            mask_1TL = None if T in (1, L) else causal_mask(T, L, q_NHd.device)[None]
            parts.append(attention(q_THd[None], k_LGd[None], v_LGd[None], mask_1TL)[0])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def query_by_query(q_NHd: Tensor, pages: Pages, batch: PagedBatch, new: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`paged_attention` with torch's kernel, one query after the other: its bits depend on its own keys alone."""
    parts = []
    for first, T, L, start, page_P in _read_spans(batch) if batch.spans is None else batch.spans:
        k_LGd, v_LGd = _keys_and_values(pages, L, start, page_P, q_NHd.dtype)
        for t in range(T):
            seen = L - T + t + 1
            # A copy of the query: libraries choose their ways by where a tensor begins, too.
            q_11Hd = q_NHd[None, first + t : first + t + 1].clone()
            parts.append(attention(q_11Hd, k_LGd[None, :seen], v_LGd[None, :seen], None)[0])
    return torch.cat(parts)


def causal_mask(T: int, L: int, device: torch.device) -> Tensor:
    """bool (T, L), true where one of the last T of L positions sees a key."""
    key_L = torch.arange(L, device=device)
    return key_L <= key_L[L - T :, None]


def _keys_and_values(
    pages: Pages, length: int, start: int | None, page_P: Tensor | None, dtype: torch.dtype
) -> Iterable[Tensor]:
    """(L, G, d) each: a view of the pool where the sequence's pages are consecutive, else a copy."""

    def read(pool_PSx: Tensor) -> Tensor:
        if start is not None:
            return pool_PSx.flatten(0, 1)[start : start + length]
        assert page_P is not None
        return pool_PSx.index_select(0, page_P).flatten(0, 1)[:length]

    if pages.k_scale_PSG is None or pages.v_scale_PSG is None:
        return read(pages.k_PSGd), read(pages.v_PSGd)
    # Gathered as bytes, as they are written.
    return [
        (read(pool.view(torch.uint8)).view(pool.dtype).float() * read(scale)[..., None]).to(dtype)
        for pool, scale in ((pages.k_PSGd, pages.k_scale_PSG), (pages.v_PSGd, pages.v_scale_PSG))
    ]


def _read_spans(batch: PagedBatch) -> list[Span]:
    """The spans of a batch that brought none, without empty ones. On a GPU this waits for the device."""
    begin = batch.query_C.tolist()
    device = batch.page_BP.device
    spans = []
    for b, (length, pages) in enumerate(zip(batch.length_B.tolist(), batch.page_BP.tolist(), strict=True)):
        if begin[b + 1] > begin[b]:
            span = Span.of(begin[b], begin[b + 1] - begin[b], length, pages)
            spans.append(span if span.page_P is None else span._replace(page_P=span.page_P.to(device)))
    return spans


def paged_attention_reference(q_NHd: Tensor, pages: Pages, batch: PagedBatch) -> Tensor:
    """The definition of `paged_attention`, in fp32. Tests compare with it."""
    k_WGd, v_WGd = pages.k_WGd.float(), pages.v_WGd.float()
    if pages.k_scale_PSG is not None and pages.v_scale_PSG is not None:
        k_WGd = k_WGd * pages.k_scale_PSG.flatten(0, 1)[..., None]
        v_WGd = v_WGd * pages.v_scale_PSG.flatten(0, 1)[..., None]
    y_NHd = torch.empty_like(q_NHd)
    begin_C = batch.query_C.tolist()
    for b, length in enumerate(batch.length_B.tolist()):
        mine = slice(begin_C[b], begin_C[b + 1])
        position_L = torch.arange(length, device=q_NHd.device)
        slot_L = batch.page_BP[b].long()[position_L // PAGE_SIZE] * PAGE_SIZE + position_L % PAGE_SIZE
        mask_1TL = causal_mask(mine.stop - mine.start, length, q_NHd.device)[None]
        y_NHd[mine] = attention_reference(q_NHd[None, mine], k_WGd[None, slot_L], v_WGd[None, slot_L], mask_1TL)[0]
    return y_NHd
