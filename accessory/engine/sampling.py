"""From logits to the next token.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.arguments import check_sampling


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

    Ids of `vocab_size` or more are never drawn: the embedding is padded with ids that the tokenizer does not have. Each
    row always takes one uniform number, so one row does not change another row's randomness.
    """
    logits_BV = logits_BV[:, :vocab_size]
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    uniform_B1 = torch.rand(len(logits_BV), 1, generator=generator, dtype=torch.float64).to(logits_BV.device)
    p_BV, token_BV = (logits_BV.float() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    mass_BV = p_BV.double().cumsum(-1)
    # The nucleus is the smallest set of tokens whose mass reaches top_p. A token belongs to it if the mass before the
    # token is less than top_p.
    size_B1 = (mass_BV - p_BV < sampling.top_p).sum(-1, keepdim=True)
    nucleus_mass_B1 = mass_BV.gather(1, size_B1 - 1)
    rank_B1 = torch.searchsorted(mass_BV, uniform_B1 * nucleus_mass_B1, right=True).minimum(size_B1 - 1)
    return token_BV.gather(1, rank_B1).squeeze(1)
