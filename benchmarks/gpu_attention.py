"""Times attention over pages at Mixtral-8x7B's sizes on one card: decoding and prompts, against torch's own kernels.

    python benchmarks/gpu_attention.py [--fp8] [--tiles]

A decode is replayed as a CUDA graph and takes turns on several caches, so that no cache lies in the card's L2. Its
floor is the bytes of its keys and values, divided by the copy rate, which is measured in the same run. torch's
`scaled_dot_product_attention` reads keys that lie side by side. A prompt of T tokens is timed without earlier context
and behind another T tokens. Its operations are those of the pairs that may look at each other, 4 · d · H each.
`--fp8` also times a cache in fp8. `--tiles` times the prompts' and decodes' kernel with other tiles. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.bench.card import measure_card, seconds_in_turn
from accessory.limits import PAGE_SIZE
from accessory.ops.attention import has_varlen, packed_attention
from accessory.ops.paged_attention import PagedBatch, Pages, causal_mask, paged_attention, rotate_and_write
from accessory.ops.rope import rope_frequencies, rotations
from accessory.ops.triton import paged_attention as kernels
from accessory.ops.triton.paged_attention import Tile

H, G, D = 32, 8, 128
BATCHES, CONTEXTS, PROMPTS = (1, 4, 16, 64), (140, 2048, 16384), (512, 2048, 8192)
# At least this many bytes of keys and values are read before the first are read again.
ROTATED_BYTES = 256 * 2**20
DECODE_TILES = [Tile(16, keys, warps, stages) for keys in (32, 64) for warps in (2, 4) for stages in (2, 3, 4)]
PROMPT_TILES = [
    Tile(M, keys, warps, stages)
    for M, warps in ((64, 4), (128, 4), (128, 8))
    for keys in (32, 64)
    for stages in (2, 3, 4)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--tiles", action="store_true")
    options = parser.parse_args()
    card = measure_card(torch.device("cuda"), torch.bfloat16)
    copy = card.copy
    print(f"{card}; {H} heads, {G} of keys and values, head_dim {D}\n")
    with torch.inference_mode():
        if options.tiles:
            tiles(copy)
            return
        print("| sequences | context | cache | write, µs | attention, µs | times the floor | torch's, µs |")
        print("|---|---|---|---|---|---|---|")
        for B in BATCHES:
            for L in CONTEXTS:
                for fp8 in (False, True) if options.fp8 else (False,):
                    decode(B, L, fp8, copy)
        print("\n| prompt | context | how | ms | TFLOP/s |\n|---|---|---|---|---|")
        for T in PROMPTS:
            for context in (0, T):
                for fp8 in (False, True) if options.fp8 else (False,):
                    prompt(T, context, fp8)


def pages_of(count: int, fp8: bool) -> Pages:
    shape = (count + 1, PAGE_SIZE, G, D)
    pools = [torch.randn(shape, device="cuda").to(torch.float8_e4m3fn if fp8 else torch.bfloat16) for _ in range(2)]
    return Pages(*pools, *(torch.rand(shape[:-1], device="cuda") for _ in range(2 if fp8 else 0)))


def batch_of(sequences: Sequence[tuple[int, int]]) -> PagedBatch:
    """(queries, length) each, on pages in random order."""
    needs = [-(-length // PAGE_SIZE) for _, length in sequences]
    tables = (torch.randperm(sum(needs)) + 1).split(needs)
    return PagedBatch.of([(n, length, t.tolist()) for (n, length), t in zip(sequences, tables, strict=True)], "cuda")


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def kv_bytes(B: int, L: int, fp8: bool) -> int:
    return 2 * B * L * G * (D + 4 if fp8 else 2 * D)


def decode(B: int, L: int, fp8: bool, copy: float) -> None:
    batch, q, k, v = batch_of([(1, L)] * B), random(B, H, D), random(B, G, D), random(B, G, D)
    count, floor = int(batch.page_BP.max()), kv_bytes(B, L, fp8) / copy
    caches = [pages_of(count, fp8) for _ in range(copies(kv_bytes(B, L, fp8)))]
    rotation = rotations(torch.full((1, B), L, device="cuda"), rope_frequencies(D, 1e6)[0].cuda())[0]
    write = replayed([partial(rotate_and_write, pages, batch.slot_N, q, k, v, rotation) for pages in caches])
    # As in an engine's graph: the table has room for more than the longest sequence.
    batch = batch._replace(longest_length=max(batch.longest_length, 8192))
    ours = replayed([partial(paged_attention, q, pages, batch) for pages in caches])
    theirs = None
    if not fp8:
        del caches
        kept = [
            (random(B, L, G, D).transpose(1, 2), random(B, L, G, D).transpose(1, 2))
            for _ in range(copies(kv_bytes(B, L, fp8)))
        ]
        sdpa = partial(F.scaled_dot_product_attention, enable_gqa=True)
        theirs = replayed([partial(sdpa, q[:, :, None], *kv) for kv in kept])
    print(
        f"| {B} | {L} | {'fp8' if fp8 else 'bf16'} | {write * 1e6:.1f} | {ours * 1e6:.1f} | {ours / floor:.2f} | "
        f"{'–' if theirs is None else f'{theirs * 1e6:.1f}'} |",
        flush=True,
    )


def prompt(T: int, context: int, fp8: bool) -> None:
    L = context + T
    batch, q, k, v = batch_of([(T, L)]), random(T, H, D), random(T, G, D), random(T, G, D)
    pages = pages_of(int(batch.page_BP.max()), fp8)
    ways: dict[str, Callable[[], object]] = {"ours": partial(paged_attention, q, pages, batch)}
    if not fp8:
        k_L, v_L = random(L, G, D), random(L, G, D)
        q_1HTd, k_1GLd, v_1GLd = (t.transpose(0, 1)[None] for t in (q, k_L, v_L))
        sdpa = partial(F.scaled_dot_product_attention, enable_gqa=True)
        if context == 0:
            if has_varlen(q.device, q.dtype):
                ways["torch, packed rows"] = partial(packed_attention, q, k, v, batch.query_C, T)
            ways["torch, causal"] = partial(sdpa, q_1HTd, k_1GLd, v_1GLd, is_causal=True)
        else:
            ways["torch, mask"] = partial(sdpa, q_1HTd, k_1GLd, v_1GLd, attn_mask=causal_mask(T, L, q.device))
    for name, way in ways.items():
        seconds = replayed([way], calls=4)
        how = name if name != "ours" else f"ours, {'fp8' if fp8 else 'bf16'}"
        print(
            f"| {T} | {context} | {how} | {seconds * 1e3:.3f} | {operations(T, L) / seconds / 1e12:.0f} |", flush=True
        )


def operations(T: int, L: int) -> int:
    pairs = T * (L - T) + T * (T + 1) // 2
    return 4 * D * H * pairs


def tiles(copy: float) -> None:
    """Time every tile in the place of the one that the kernel takes."""
    print("| what | rows | keys | warps | stages | µs | times the floor, or TFLOP/s |\n|---|---|---|---|---|---|---|")
    decodes = [(B, L) for B in (1, 16) for L in (140, 2048, 16384)]
    cases: list[tuple[str, list[tuple[int, int]], list[Tile]]] = [
        *((f"{B} decodes at {L}", [(1, L)] * B, DECODE_TILES) for B, L in decodes),
        *(
            (f"prompt of {T} behind {L - T}", [(T, L)], PROMPT_TILES)
            for T, L in ((2048, 2048), (2048, 4096), (8192, 8192))
        ),
    ]
    for name, sequences, candidates in cases:
        batch, N = batch_of(sequences), sum(n for n, _ in sequences)
        q, size = random(N, H, D), kv_bytes(len(sequences), sequences[0][1], False)
        caches = [pages_of(int(batch.page_BP.max()), False) for _ in range(copies(size))]
        for tile in candidates:
            kernels.TILES = {2**62: tile}
            try:
                seconds = replayed([partial(paged_attention, q, pages, batch) for pages in caches])
            except Exception as error:  # a tile that the card has no room for
                print(f"| {name} | {' | '.join(map(str, tile))} | {type(error).__name__} | – |", flush=True)
                continue
            decoding = batch.decodes > 0
            measure = seconds / (size / copy) if decoding else operations(*sequences[0]) / seconds / 1e12
            print(f"| {name} | {' | '.join(map(str, tile))} | {seconds * 1e6:.1f} | {measure:.2f} |", flush=True)


def replayed(ways: Sequence[Callable[[], object]], calls: int = 64) -> float:
    return seconds_in_turn(ways, torch.device("cuda"), calls)


def copies(size: int) -> int:
    return -(-ROTATED_BYTES // size)


if __name__ == "__main__":
    main()
