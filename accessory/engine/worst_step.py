"""The largest steps that a scheduler can plan, and the memory that a GPU takes for them.

A cache that is to take all that is free must leave room for them, so they run before it is made.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from accessory.engine.runner import About, Runner
from accessory.engine.sampling_params import MOST_LOGPROBS, SamplingParams
from accessory.engine.scheduler import Begin, Entry, StepPlan
from accessory.limits import GRAPH_MOST_TOKENS, GRAPH_PROMPTS, PAGE_SIZE, STEP_TOKENS_GPU
from accessory.parallel.mesh import Ranks

# Everything that takes memory while tokens are drawn and prompts are judged.
_PARAMS = SamplingParams(
    temperature=1.0, top_p=0.9, frequency_penalty=0.1, seed=0, logprobs=MOST_LOGPROBS, prompt_logprobs=MOST_LOGPROBS
)


def worst_step_bytes(make_runner: Callable[[int], Runner], max_seq_len: int, ranks: Ranks | None) -> int:
    """The bytes that the largest steps take on the GPU beside weights and cache, on the rank where they take the most.

    make_runner: makes a runner with so many pages. It is dropped afterwards. Every rank must call this. Counted is what
    torch reserves, so that holes in its allocator and the memory of graphs are in it.
    """
    runner = make_runner(1 + -(-min(max_seq_len, STEP_TOKENS_GPU) // PAGE_SIZE))
    device = runner.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for plan in worst_steps(runner.about, max_seq_len):
        runner.run(plan).result()
    taken = [torch.cuda.max_memory_reserved(device) - before]
    del runner
    gc.collect()  # a runner and its graphs refer to each other
    torch.cuda.empty_cache()
    if ranks is not None:
        taken *= ranks.size
        dist.all_gather_object(taken, taken[0], group=ranks.group)
    return max(taken)


def worst_steps(about: About, max_seq_len: int) -> Iterator[StepPlan]:
    """Steps with the most tokens: of the most sequences, which then decode, alone and beside a prompt; of prompts in
    the largest graph, which keeps its memory; and of prompts that are judged.

    All sequences write to the same pages, because nobody reads what comes out.
    """
    few, longest = max(1, min(about.step_tokens // about.max_running, max_seq_len - 1)), max_seq_len - 1
    yield StepPlan([_prompt(slot, few, judged=False) for slot in range(about.max_running)])
    decoding = [Entry(slot, few, None, (), 1, None, decodes=True) for slot in range(about.max_running)]
    yield StepPlan(decoding)
    last, graphed = about.max_running - 1, min(GRAPH_MOST_TOKENS, about.step_tokens)
    beside = max(min(graphed - about.max_running, longest), 1)
    yield StepPlan([*decoding[:last], _prompt(last, beside, judged=False)])
    prompts = min(GRAPH_PROMPTS, -(-graphed // longest))
    yield StepPlan([_prompt(slot, min(graphed // prompts, longest), judged=False) for slot in range(prompts)])
    left = about.step_tokens
    entries: list[Entry] = []
    while left and len(entries) < about.max_running:
        entries.append(_prompt(len(entries), min(left, longest), judged=True))
        left -= len(entries[-1].ids or ())
    yield StepPlan(sorted(entries, key=lambda e: len(e.ids or ()) > 1))  # sequences with one token come first


def _prompt(slot: int, tokens: int, judged: bool) -> Entry:
    ids = (1,) * tokens
    begin = Begin(_PARAMS, ids, (), frozenset(), -1, ())
    return Entry(slot, 0, ids, tuple(range(1, 1 + -(-tokens // PAGE_SIZE))), 0, begin, ids if judged else ())
