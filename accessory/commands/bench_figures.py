"""From the records of a load to its figures: percentiles of times, tokens a second, errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from accessory.commands.bench_load import Record

PERCENTILES = (50, 90, 99)
# Key, what a table calls it.
TIMES = (
    ("time_to_first_token", "to the first token"),
    ("time_per_output_token", "a token after it"),
    ("time_between_pieces", "between pieces"),
    ("time_to_end", "to the end"),
)


def times_of(records: Sequence[Record]) -> dict[str, list[float]]:
    """Seconds of the requests that succeeded, by the keys of `TIMES`.

    A piece has a token or more: tokens that end inside a character come with the next one. So the time of a token is
    that of a whole answer after its first piece, divided by its tokens but one.
    """
    good = [record for record in records if record.error is None and record.pieces]
    return {
        "time_to_first_token": [r.pieces[0] - r.sent for r in good],
        "time_per_output_token": [(r.pieces[-1] - r.pieces[0]) / (r.tokens - 1) for r in good if r.tokens > 1],
        "time_between_pieces": [
            late - early for r in good for early, late in zip(r.pieces, r.pieces[1:], strict=False)
        ],
        "time_to_end": [r.ended - r.sent for r in good],
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Percentiles with linear interpolation, mean and largest of some values; None where there are none."""
    if not values:
        return None
    found = {f"p{q}": float(np.percentile(values, q)) for q in PERCENTILES}
    return {**found, "mean": float(np.mean(values)), "max": max(values)}


def figures(records: Sequence[Record]) -> dict[str, Any]:
    """The figures of a load. Seconds run from the first request sent to the last answer's end."""
    good = [record for record in records if record.error is None]
    seconds = max((r.ended for r in records), default=0.0) - min((r.sent for r in records), default=0.0)
    sums = {name: sum(getattr(r, name) for r in good) for name in ("prompt_tokens", "cached_tokens", "tokens")}

    def rate(count: int) -> float:
        return count / seconds if seconds else 0.0

    return {
        "requests": len(records),
        "errors": len(records) - len(good),
        "error_messages": dict(Counter(r.error for r in records if r.error is not None)),
        "seconds": seconds,
        "requests_per_second": rate(len(good)),
        "prompt_tokens": sums["prompt_tokens"],
        "cached_tokens": sums["cached_tokens"],
        "output_tokens": sums["tokens"],
        "prompt_tokens_per_second": rate(sums["prompt_tokens"]),
        "output_tokens_per_second": rate(sums["tokens"]),
        **{key: spread(values) for key, values in times_of(records).items()},
    }


def as_json(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [asdict(record) for record in records]


def table(found: dict[str, Any]) -> list[str]:
    """The figures as lines for a terminal, times in milliseconds."""
    columns = (*(f"p{q}" for q in PERCENTILES), "mean", "max")
    lines = [f"{'milliseconds':<20}" + "".join(f"{name:>10}" for name in columns)]
    for key, name in TIMES:
        if found[key] is not None:
            lines.append(f"{name:<20}" + "".join(f"{1000 * found[key][column]:>10.1f}" for column in columns))
    cached = found["cached_tokens"] / found["prompt_tokens"] if found["prompt_tokens"] else 0.0
    lines.append(
        f"{found['requests_per_second']:.2f} requests/s; tokens/s: {found['prompt_tokens_per_second']:.1f} in "
        f"({cached:.0%} from shared pages), {found['output_tokens_per_second']:.1f} out"
    )
    return lines
