"""From logits to the next token.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.arguments import check_sampling

NO_TOKEN = -1  # where no token can be drawn
# Logits divided by less could overflow. The most likely token has all the mass long before.
LEAST_TEMPERATURE = 2.0**-64


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedily at temperature 0, else by nucleus sampling (arXiv 1904.09751).

    Runs with the same `seed` draw the same tokens. Without a seed, draws come from torch's global generator, which
    `torch.manual_seed` sets. InputError for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 0.95
    seed: int | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.seed)

    def generator(self) -> torch.Generator | None:
        """A CPU generator with the seed, or None. Draws are always on the CPU, so a seed works alike on all devices."""
        return None if self.seed is None else torch.Generator("cpu").manual_seed(int(self.seed))


def sample(
    logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None = None, vocab_size: int | None = None
) -> Tensor:
    """The next token of each row, int64 (B,), on the logits' device.

    A row whose logits are not finite gets `NO_TOKEN`. Ids of `vocab_size` or more are never drawn: the embedding is
    padded with ids that the tokenizer does not have. Each row always takes one uniform number, so one row does not
    change another row's randomness.
    """
    logits_BV = logits_BV[:, :vocab_size]
    largest_B, likeliest_B = logits_BV.max(-1)
    finite_B = largest_B < math.inf  # false for NaN too, which is larger than every number to `max`
    if sampling.temperature == 0:
        return torch.where(finite_B, likeliest_B, NO_TOKEN)
    uniform_B1 = torch.rand(len(logits_BV), 1, generator=generator, dtype=torch.float64).to(logits_BV.device)
    temperature = max(sampling.temperature, LEAST_TEMPERATURE)
    p_BV, token_BV = (logits_BV.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    mass_BV = p_BV.double().cumsum(-1)
    # The nucleus is the smallest set of tokens whose mass reaches top_p. A token belongs to it if the mass before the
    # token is less than top_p.
    size_B1 = (mass_BV - p_BV < sampling.top_p).sum(-1, keepdim=True).clamp_(min=1)  # 0 for NaN
    nucleus_mass_B1 = mass_BV.gather(1, size_B1 - 1)
    rank_B1 = torch.searchsorted(mass_BV, uniform_B1 * nucleus_mass_B1, right=True).minimum(size_B1 - 1)
    return torch.where(finite_B, token_BV.gather(1, rank_B1).squeeze(1), NO_TOKEN)
