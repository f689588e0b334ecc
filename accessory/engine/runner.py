"""One rank of a model: network, image encoders, paged cache, graphs and sampling. It does what a `StepPlan` says.

Legend: N tokens of a step, B its sequences, C columns, P pages of a sequence, R rows whose logits are needed,
V vocabulary, W positions of an image, D dim, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from accessory.engine.graphs import StepGraphs
from accessory.engine.sampler import Drawn, Sampler
from accessory.engine.scheduler import Entry, StepPlan
from accessory.engine.step import Step
from accessory.engine.step_input import Size, StepInput
from accessory.launch.memory import room_for
from accessory.limits import MAX_RUNNING_CPU, MAX_RUNNING_GPU, PAGE_SIZE, STEP_TOKENS_CPU, STEP_TOKENS_GPU
from accessory.nn.cache import PagedCache, bytes_a_page
from accessory.nn.decoder import Decoder
from accessory.nn.experts import StackedExperts
from accessory.ops import dispatch
from accessory.ops.linear import AdapterRows
from accessory.ops.paged_attention import PagedBatch, Span, runs_host_free
from accessory.ops.transfer import to_device
from accessory.parallel.collectives import broadcast
from accessory.parallel.mesh import Ranks
from accessory.vision_config import IMAGE_ID

LAST_DRAW = -2  # in place of a token id: what the slot drew last. It is not `IMAGE_ID`.
# The parts of the free memory that a cache may take. The rest is for what no plan knows, on a CPU for other programs.
CACHE_OF_GPU, CACHE_OF_HOST = 0.9, 0.5


class About(NamedTuple):
    """What a scheduler must know of the ranks that run its steps."""

    pages: int
    max_running: int  # sequences that run at once
    step_tokens: int  # the most tokens of a step
    on_cpu: bool
    max_seq_len: int | None = None
    vocab_size: int | None = None  # tokens that may be drawn
    deterministic: bool = False  # whether a request's bits do not depend on what runs beside it


class Runner:
    """Runs steps of `decoder`. Every rank of a model has one, and they run the same steps.

    pages: of the cache. fp8: whether they hold fp8 numbers. see: turns the pixels of images into the encoders'
    features; None for a text-only model. vocab_size: of the tokenizer; larger ids are never drawn. explained: a context
    that says more of memory that runs out in it. deterministic: a request's bits do not depend on what runs beside it,
    or on how its prompt is cut. The first rank draws for all.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        pages: int,
        max_seq_len: int,
        vocab_size: int,
        fp8: bool = False,
        see: Callable[[Sequence[Any]], Any] | None = None,
        ranks: Ranks | None = None,
        explained: Callable[[], AbstractContextManager[None]] = nullcontext,
        deterministic: bool = False,
    ) -> None:
        self.decoder, self._see, self._explained = decoder.fuse(), see, explained
        self._ranks = ranks if ranks is not None and ranks.size > 1 else None
        self.device = decoder.tok_embeddings.weight.device
        on_cpu = self.device.type == "cpu"
        # Streams, events and captures belong to a thread's current card, which need not be the network's.
        self._on_card: Callable[[], AbstractContextManager[Any]]
        self._on_card = nullcontext if on_cpu else partial(torch.cuda.device, self.device)
        max_running = MAX_RUNNING_CPU if on_cpu else MAX_RUNNING_GPU
        budget = STEP_TOKENS_CPU if on_cpu else STEP_TOKENS_GPU
        self.about = About(pages, max_running, budget, on_cpu, max_seq_len, vocab_size, deterministic)
        with explained():
            self.cache = PagedCache(decoder.args, pages, self.device, decoder.products_in, decoder.kv_heads, fp8)
        self._sampler = Sampler(max_running, vocab_size, self.device)
        self._last_S = torch.zeros(max_running, dtype=torch.int64, device=self.device)
        longest = min(-(-max_seq_len // PAGE_SIZE), pages - 1)  # no sequence has more pages
        self._table_SP = np.zeros((max_running, longest), dtype=np.int32)
        self._filled = [0] * max_running  # how many pages of each slot are in `_table_SP`
        # How many of the likeliest tokens each slot's request wants, of its answer and of its prompt.
        self._logprobs: list[int | None] = [None] * max_running
        self._prompt_logprobs = [0] * max_running
        self._adapter_S = np.full(max_running, -1)
        self._images: dict[int, list[tuple[int, Tensor]]] = {}  # by slot: first position, embeddings (W, D)
        self._graphs = StepGraphs(self._recorded, self._host_free, longest, self.device, max_running)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Step:
        """Start a step. On a GPU it may still be under way when this returns."""
        with self._explained(), self._on_card():
            return self._run(plan.entries)

    def _run(self, entries: list[Entry]) -> Step:
        for entry in entries:
            self._take(entry)
        draws = [n for n, entry in enumerate(entries) if entry.draw is not None]
        rows: dict[int, Tensor] = {}  # logits (V,) of the entries that draw
        scored: dict[int, tuple[Drawn, int]] = {}
        passes = self._passes(entries)
        for fixed, numbers in passes:
            mine = [n for n in numbers if entries[n].draw is not None]
            with dispatch.fixing(fixed):
                logits_RV, judged = self._pass([entries[n] for n in numbers])
            scored |= {numbers[n]: found for n, found in judged.items()}
            if len(passes) > 1:  # a copy: the next pass may be a graph, and all graphs have one memory
                rows |= dict(zip(mine, logits_RV.clone().unbind(), strict=True))
        if rows:
            logits_RV = torch.stack([rows[n] for n in draws])
        drawing = [entries[n] for n in draws]
        asked = [self._logprobs[entry.slot] for entry in drawing]
        return Step(self._draw(drawing, logits_RV), asked, scored, self.device)

    def _passes(self, entries: list[Entry]) -> list[tuple[dispatch.Fixed, Sequence[int]]]:
        """The passes through the network that make up a step: the numbers of their entries.

        Where bits must not depend on what else runs, decoding, prompts, and both with adapters take kernels of their
        own. So a pass has tokens of one kind only.
        """
        if not self.about.deterministic:
            return [("", range(len(entries)))]
        kinds: dict[tuple[dispatch.Fixed, bool], list[int]] = {}
        for n, entry in enumerate(entries):
            kind: dispatch.Fixed = "decode" if entry.decodes else "prompt"
            kinds.setdefault((kind, bool(self._adapter_S[entry.slot] >= 0)), []).append(n)
        return [(kind, numbers) for (kind, _), numbers in kinds.items()]

    def _pass(self, entries: list[Entry]) -> tuple[Tensor, dict[int, tuple[Drawn, int]]]:
        """The logits (R, V) of the entries that draw, and what is asked for of prompts, by the entry's number."""
        draws = [n for n, entry in enumerate(entries) if entry.draw is not None]
        scores = [n for n, entry in enumerate(entries) if entry.targets]
        adapted = any(self._adapter_S[entry.slot] >= 0 for entry in entries)
        step, size = self._numbers(entries, draws, scores)
        recorded = None
        if not scores and dispatch.fixed() != "prompt" and not any(self._images.get(entry.slot) for entry in entries):
            recorded = self._graphs.size(size, adapted)
        if recorded is None:
            return self._forward(entries, draws, scores, adapted, step, size)
        logits_BV = self._graphs.step(recorded, step, size, adapted)
        beside = recorded.decodes - size.decodes  # rows of padding between decoding sequences and prompts
        rows = [n if n < size.decodes else n + beside for n in draws]
        if rows == list(range(len(rows))):
            return logits_BV[: len(rows)], {}
        return logits_BV[self._upload(np.array(rows, dtype=np.int64))], {}

    def _take(self, entry: Entry) -> None:
        """Note what is new of a sequence: its pages, and in its first step how it draws and what it sees."""
        slot = entry.slot
        if entry.begin is not None:
            begin = entry.begin
            self._filled[slot], self._adapter_S[slot], params = 0, begin.adapter, begin.params
            self._logprobs[slot], self._prompt_logprobs[slot] = params.logprobs, params.prompt_logprobs or 0
            self._sampler.start(slot, params, begin.prompt, begin.answer, begin.stop_ids)
            self._images.pop(slot, None)
            if begin.images:
                assert self._see is not None, "a text-only model's requests have no images"
                seen = []
                for start, count, pixels in begin.images:
                    seen_WD = self.decoder.image_embeddings(self._see([pixels]), self.decoder.products_in)
                    assert len(seen_WD) == count
                    seen.append((start, seen_WD))
                self._images[slot] = seen
        if entry.pages:
            first, end = self._filled[slot], self._filled[slot] + len(entry.pages)
            self._table_SP[slot, first:end] = entry.pages
            self._filled[slot] = end

    def _draw(self, entries: list[Entry], logits_RV: Tensor) -> Drawn | None:
        """Draw a token for each row, and keep it for the next step."""
        if not entries:
            return None
        slots = [entry.slot for entry in entries]
        if self._ranks is None or self._ranks.rank == 0:
            masks = {n: entry.mask for n, entry in enumerate(entries) if entry.mask is not None}
            drawn = self._sampler(logits_RV, slots, [entry.draw or 0 for entry in entries], masks)
        else:
            drawn = Drawn(torch.empty(len(slots), dtype=torch.int64, device=self.device))
        if self._ranks is not None:
            broadcast(drawn.token_B, self._ranks)
        self._last_S[self._upload(np.array(slots))] = drawn.token_B.clamp_min(0)  # negative where no token was drawn
        return drawn

    # ----------------------------------------------------------------- a step's pass

    def _numbers(self, entries: list[Entry], draws: Sequence[int], scores: Sequence[int]) -> tuple[StepInput, Size]:
        """What the network must know of a step whose rows are those that draw, then all judged ones."""
        slot_B = np.array([entry.slot for entry in entries])
        start_B = np.array([entry.start for entry in entries])
        count_B = np.array([1 if entry.ids is None else len(entry.ids) for entry in entries])
        query_C = np.concatenate([[0], count_B.cumsum()])
        position_T = np.arange(query_C[-1]) + np.repeat(start_B - query_C[:-1], count_B)
        slot_T = np.repeat(slot_B, count_B)
        judged = [range(query_C[n], query_C[n] + len(entries[n].targets)) for n in scores]
        length_B, decodes = start_B + count_B, int((count_B == 1).sum())
        step = StepInput(
            token_T=np.concatenate([[LAST_DRAW] if entry.ids is None else entry.ids for entry in entries]),
            position_T=position_T,
            write_T=self._table_SP[slot_T, position_T // PAGE_SIZE] * PAGE_SIZE + position_T % PAGE_SIZE,
            slot_T=slot_T,
            adapter_T=self._adapter_S[slot_T],
            length_B=length_B,
            query_C=query_C,
            row_R=np.array([*(query_C[n + 1] - 1 for n in draws), *(row for rows in judged for row in rows)], np.int64),
            page_BP=self._table_SP[slot_B, : -(-int(length_B.max()) // PAGE_SIZE)],
        )
        prompts = len(entries) - decodes
        return step, Size(decodes, len(slot_T) - decodes, prompts, len(step.row_R), step.page_BP.shape[1])

    def _forward(
        self,
        entries: list[Entry],
        draws: Sequence[int],
        scores: Sequence[int],
        adapted: bool,
        step: StepInput,
        size: Size,
    ) -> tuple[Tensor, dict[int, tuple[Drawn, int]]]:
        """The logits (R, V) after the last tokens of the entries `draws`, and all positions of `scores` judged."""
        count_B, fixed = np.diff(step.query_C), dispatch.fixed()
        here = StepInput.views(self._upload(step.flat(size), np.int32), size)
        batch = PagedBatch(
            slot_N=here.write_T.long(),
            page_BP=here.page_BP,
            length_B=here.length_B,
            query_C=here.query_C,
            decodes=0 if fixed == "prompt" else size.decodes,
            longest=int(count_B.max()) if fixed == "prompt" or size.prompts else 0,
            # How many keys a split has may follow from this number, which must not follow from the batch then.
            longest_length=self._table_SP.shape[1] * PAGE_SIZE if fixed else int(step.length_B.max()),
            fresh=not (step.length_B - count_B)[size.decodes :].any(),
            spans=[
                Span.of(first, count, length, pages)
                for first, count, length, pages in zip(
                    step.query_C.tolist(), count_B.tolist(), step.length_B.tolist(), step.page_BP.tolist(), strict=False
                )
            ]
            if self.about.on_cpu
            else None,
        )
        logits_RV = self._logits(here, batch, adapted, here.row_R.long(), self._seen(entries))
        scored, at = {}, len(draws)
        for n in scores:
            ids_T, most = self._upload(np.array(entries[n].targets)), self._prompt_logprobs[entries[n].slot]
            judged_T = self._sampler.prompt_logprobs(logits_RV[at : at + len(ids_T)], ids_T, most)
            scored[n] = Drawn(ids_T, *judged_T), most
            at += len(ids_T)
        return logits_RV[: len(draws)], scored

    def _recorded(self, flat: Tensor, size: Size, adapted: bool) -> Tensor:
        """The logits (B, V) after the last tokens of all sequences of a step, padding too. A graph records it.

        adapted: whether a token takes one of the adapters.
        """
        here = StepInput.views(flat, size)
        batch = PagedBatch(
            slot_N=here.write_T.long(),
            page_BP=here.page_BP,
            length_B=here.length_B,
            query_C=here.query_C,
            decodes=size.decodes,
            longest=size.tokens,
            longest_length=size.pages * PAGE_SIZE,
            padded=True,
        )
        return self._logits(here, batch, adapted, here.row_R.long() if size.rows else None)

    def _host_free(self, tokens: int, adapted: bool) -> bool:
        """Whether so many tokens pass through attention and experts without the host learning lengths and routing."""
        if not runs_host_free(self.device, self.decoder.products_in, self.cache.fp8):
            return False
        experts = next(m for m in self.decoder.modules() if isinstance(m, StackedExperts))
        args = self.decoder.args
        with torch.inference_mode():
            x_TD = torch.empty(tokens, args.dim, device=self.device, dtype=self.decoder.products_in)
            expert_TK = torch.empty(tokens, args.moe.num_experts_per_tok, device="meta")
            return experts.host_free(x_TD, expert_TK, adapted)

    def again(self, sequences: int) -> Callable[[], None] | None:
        """Computes the last decoding step of so many sequences again; None where no graph holds it.

        It changes nothing, so measurements may call it as often as they like. On several ranks all must.
        """
        with dispatch.fixing("decode" if self.about.deterministic else ""):
            size = self._graphs.size(Size(sequences, 0, 0, sequences, 0), False)
        return None if size is None else self._graphs.again(size, False)

    def _seen(self, entries: list[Entry]) -> Tensor | None:
        """The image tokens (positions, D) of this step, in its order."""
        parts = []
        for entry in entries:
            if entry.ids is None or IMAGE_ID not in entry.ids:
                continue
            end = entry.start + len(entry.ids)
            for first, seen_WD in self._images[entry.slot]:
                here_WD = seen_WD[max(entry.start - first, 0) : max(end - first, 0)]
                parts.append(here_WD)
            self._images[entry.slot] = [i for i in self._images[entry.slot] if i[0] + len(i[1]) > end]
        return torch.cat(parts) if parts else None

    def _logits(
        self,
        here: StepInput,
        batch: PagedBatch,
        adapted: bool,
        rows_R: Tensor | None,
        seen_WD: Tensor | None = None,
    ) -> Tensor:
        """The logits of these tokens, or of all."""
        token_T, slot_T = here.token_T.long(), here.slot_T.long()
        token_T = torch.where(token_T == LAST_DRAW, self._last_S[slot_T], token_T)
        self.cache.begin(batch)
        return self.decoder(
            token_T[None],
            here.position_T.long()[None],
            cache=self.cache,
            rows_N=rows_R,
            images=seen_WD,
            adapters=AdapterRows(here.adapter_T.long(), self.decoder.adapters) if adapted else None,
        ).logits.flatten(0, -2)

    def _upload(self, numbers: np.ndarray, dtype: Any = np.int64) -> Tensor:
        """Numbers of the host on the device, without waiting for it."""
        host = torch.from_numpy(np.ascontiguousarray(numbers, dtype=dtype))
        return to_device(host, self.device)

    # ----------------------------------------------------------------- scoring

    @torch.inference_mode()
    def score(self, rows: Sequence[Sequence[int]], images: Sequence[Any]) -> list[Tensor]:
        """The logits (T, V) fp32 after each of the T tokens of each row. images: the pixels of each row's image."""
        with self._explained(), self._on_card():
            return self._score(rows, images)

    def _score(self, rows: Sequence[Sequence[int]], images: Sequence[Any]) -> list[Tensor]:
        out: list[Tensor] = []
        together = 1 if self.about.deterministic else self.decoder.args.max_batch_size
        for first in range(0, len(rows), together):
            here = rows[first : first + together]
            # Padding is on the right and attention is causal, so no real token sees the padding.
            tokens_BT = np.zeros((len(here), max(map(len, here))), dtype=np.int64)
            for n, ids in enumerate(here):
                tokens_BT[n, : len(ids)] = ids
            pixels = [p for p in images[first : first + together] if p is not None]
            seen = self._see(pixels) if pixels and self._see is not None else None
            logits_BTV = self.decoder(self._upload(tokens_BT), images=seen).logits
            out += [logits_BTV[n, : len(ids)].float() for n, ids in enumerate(here)]
        return out


def fitting_pages(
    decoder: Decoder, wanted: int, ranks: Ranks | None, beside: int = 0, *, fp8: bool = False, more: bool = False
) -> int:
    """How many of the `wanted` pages a cache can have, on every rank: in most of a GPU's free memory, or half a CPU's.

    beside: bytes that stay free for a step's tensors. more: take all pages that fit, where the system says how many. At
    least two pages, page 0 and one more: a scheduler then says what each request lacks.
    """
    room = room_for(decoder.tok_embeddings.weight.device, None if ranks is None else ranks.group)
    if room is None:
        return wanted
    size = bytes_a_page(decoder.args, decoder.kv_heads, decoder.products_in, fp8)
    part = CACHE_OF_GPU if room.on_gpu else CACHE_OF_HOST
    fitting = int(part * (room.nbytes - beside)) // size
    return max(2, fitting if more else min(wanted, fitting))
