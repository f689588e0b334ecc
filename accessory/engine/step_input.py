"""What the network must know of a step's tokens and sequences, as numbers. One vector holds them on the way to a GPU.

Sequences with one token come first. The tokens of prompts follow, those of one sequence after those of another. A CUDA
graph has room for so many of each (`Size`); what is left of it is padding.

Legend: T tokens, B sequences, C = B + 1, R rows whose logits are needed, P pages of a sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from accessory.limits import PAGE_SIZE


class Size(NamedTuple):
    """decodes: sequences with one token. tokens: of the other sequences, the prompts, and how many these are. rows:
    whose logits are needed. pages: columns of the page table."""

    decodes: int
    tokens: int
    prompts: int
    rows: int
    pages: int

    @property
    def all_tokens(self) -> int:
        return self.decodes + self.tokens

    @property
    def sequences(self) -> int:
        return self.decodes + self.prompts

    def holds(self, step: Size) -> bool:
        """Whether a graph of this size has room for a step, the prompt that is padding beside its own."""
        if not step.prompts:
            return not self.prompts and step.decodes <= self.decodes
        return step.decodes <= self.decodes and step.tokens <= self.tokens and step.prompts < self.prompts

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the fields of a `StepInput`."""
        T, B = self.all_tokens, self.sequences
        return (T,), (T,), (T,), (T,), (T,), (B,), (B + 1,), (self.rows,), (B, self.pages)

    def zeros(self) -> np.ndarray:
        """For the numbers of all fields."""
        return np.zeros(sum(_aligned(int(np.prod(shape))) for shape in self.shapes()), dtype=np.int32)


class StepInput(NamedTuple):
    """Arrays, or tensors, of int32."""

    token_T: Any  # ids, or what stands for one
    position_T: Any
    write_T: Any  # where its key and value go: page · PAGE_SIZE + place in the page
    slot_T: Any  # of its sequence
    adapter_T: Any  # -1: none
    length_B: Any  # keys of each sequence, the new ones included
    query_C: Any  # the first token of each sequence, then T
    row_R: Any  # tokens whose logits are needed
    page_BP: Any  # page table of each sequence

    def flat(self, size: Size) -> np.ndarray:
        """All numbers of arrays, of a step of this size, in one."""
        flat = size.zeros()
        for view, field in zip(StepInput.views(flat, size), self, strict=True):
            view[:] = field
        return flat

    @classmethod
    def views(cls, flat: Any, size: Size) -> StepInput:
        """The fields of a step of this size, as views of its numbers."""
        fields, at = [], 0
        for shape in size.shapes():
            count = int(np.prod(shape))
            fields.append(flat[at : at + count].reshape(shape))
            at += _aligned(count)
        assert at == len(flat)
        return cls(*fields)


def _aligned(count: int) -> int:
    """Triton compiles a kernel anew for a pointer that is no multiple of 16 bytes, so each field begins at one."""
    return -(-count // 4) * 4


def padded(step: StepInput, here: Size, size: Size) -> np.ndarray:
    """The numbers of a step of size `here`, filled up to `size`, whose rows are the last tokens of all sequences.

    Padding writes to page 0, which no sequence owns, and sees only what it wrote. The tokens of prompts that are left
    are one more prompt, the last one; other sequences that are left have no token.
    """
    flat = size.zeros()
    out = StepInput.views(flat, size)
    out.adapter_T[:], out.length_B[:] = -1, 1
    decodes, first, left = here.decodes, size.decodes, size.tokens - here.tokens
    for now, new in zip(step[:5], out[:5], strict=True):  # a number a token
        new[:decodes], new[first : first + here.tokens] = now[:decodes], now[decodes:]
    for now, new in ((step.length_B, out.length_B), (step.page_BP[:, : size.pages], out.page_BP[:, : here.pages])):
        new[:decodes], new[first : first + here.prompts] = now[:decodes], now[decodes:]
    out.query_C[: first + 1] = np.arange(first + 1)
    if size.tokens:
        assert here.prompts < size.prompts, "one is padding"
        out.query_C[first : first + here.prompts + 1] = step.query_C[decodes:] - decodes + first
        out.query_C[first + here.prompts + 1 :] = first + here.tokens
        out.query_C[-1] = size.all_tokens
        out.position_T[size.all_tokens - left :] = np.arange(left)
        out.write_T[size.all_tokens - left :] = np.arange(left) % PAGE_SIZE
        out.length_B[-1] = max(left, 1)
        out.row_R[:] = np.maximum(out.query_C[1:] - 1, 0)
    return flat
