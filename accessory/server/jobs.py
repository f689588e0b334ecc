"""A request's answers under way, and how many tokens they took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accessory.model.writing import Completion
from accessory.server.answers import Answer
from accessory.server.protocol import CompletionRequest, Generation


@dataclass
class Job:
    """One request's answers under way: `copies` of each prompt, in the order of prompts."""

    id: str
    body: Generation
    answers: list[Answer]
    prompts: list[list[int]]
    created: int = field(default_factory=lambda: int(time.time()))


def usage_so_far(job: Job) -> dict[str, Any]:
    return usage(job, [answer.completion for answer in job.answers])


def usage(job: Job, completions: Sequence[Completion]) -> dict[str, Any]:
    """Tokens of prompts (each counted once) and answers."""
    first_copies = completions[:: job.body.n]
    prompt = sum(completion.prompt_tokens for completion in first_copies)
    zero = isinstance(job.body, CompletionRequest) and job.body.max_tokens == 0
    written = 0 if zero else sum(len(completion.token_ids) for completion in completions)
    cached = sum(completion.cached_tokens for completion in first_copies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
