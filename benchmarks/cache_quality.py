"""Measures the quality that a key/value cache in fp8 costs.

    make demo && python benchmarks/cache_quality.py demo-model/base

The text is Python's own help (pydoc_data), in rows of 512 tokens. The engine judges every token, given those before it,
in steps of at most 128 tokens. It also continues the beginnings of the rows greedily. With a cache in fp8 every query
reads rounded keys and values, also those of its own step, so all figures are of rounded ones. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
import time
from pydoc_data.topics import topics

import torch

from accessory.engine.sampling_params import SamplingParams
from accessory.engine.sequence import Draw, Sequence
from accessory.model.meta import MetaModel
from accessory.model.options import torch_dtype

LENGTH, BUDGET = 512, 128  # tokens of a row, and of a step
BEGINNING, ANSWER = 64, 64  # tokens
Rows = list[list[Draw]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--dtypes", nargs="+", default=("fp32", "bf16"), help="of the products (fp32 bf16)")
    parser.add_argument("--tokens", type=int, default=8192, help="to measure on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}\n")
    print("| products | cache | perplexity | change | mean move of a log-probability | same likeliest | same answer |")
    print("|---|---|---|---|---|---|---|")
    started = time.perf_counter()
    for dtype in options.dtypes:
        own = measured(options, dtype, None)
        for cache in (None, "fp8"):
            row = compared(own, own if cache is None else measured(options, dtype, cache))
            print(f"| {' | '.join([dtype, cache or dtype, *row])} |", flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s in all.")


def measured(options: argparse.Namespace, dtype: str, cache: str | None) -> tuple[Rows, Rows]:
    """What is known of each token of the text, and greedy answers to the beginnings of its rows."""
    model = MetaModel.from_pretrained(
        options.path, dtype=torch_dtype(dtype), device=options.device, max_seq_len=LENGTH + 1, cache_dtype=cache
    )
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = model.tokenizer.encode(text[: options.tokens * 8], bos=False)[: options.tokens // LENGTH * LENGTH]
    assert len(ids) >= LENGTH, "--tokens: too few, or more than the text has"
    rows = [ids[n : n + LENGTH] for n in range(0, len(ids), LENGTH)]
    engine = model.engine()
    engine.scheduler.budget = BUDGET
    judged = [engine.add(Sequence(row, SamplingParams(prompt_logprobs=1), 1)) for row in rows]
    continued = [engine.add(Sequence(row[:BEGINNING], SamplingParams(), ANSWER)) for row in rows]
    while engine.step():
        pass
    return [[d for d in request.prompt_logprobs if d] for request in judged], [[*r.drawn] for r in continued]


def compared(own: tuple[Rows, Rows], found: tuple[Rows, Rows]) -> list[str]:
    pairs = [pair for rows in zip(own[0], found[0], strict=True) for pair in zip(*rows, strict=True)]
    own_N, found_N = (torch.tensor([pair[n].logprob for pair in pairs]).double() for n in (0, 1))
    reference, perplexity = (math.exp(-logprob_N.mean()) for logprob_N in (own_N, found_N))
    same = sum([*a.top] == [*b.top] for a, b in pairs) / len(pairs)
    answers = sum(a == b for a, b in zip(own[1], found[1], strict=True))
    return [
        f"{perplexity:.3f}",
        f"{perplexity / reference - 1:+.2%}",
        f"{(own_N - found_N).abs().mean():.4f}",
        f"{same:.2%}",
        f"{answers} of {len(own[1])}",
    ]


if __name__ == "__main__":
    main()
