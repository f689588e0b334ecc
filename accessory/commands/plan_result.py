"""What `accessory plan` finds: `Plan`, which `plan` computes and `plan_view` shows."""

from __future__ import annotations

from dataclasses import dataclass

from accessory.config import Implementation, ModelArgs
from accessory.formats import Quant
from accessory.planner.encoders import parameter_count
from accessory.planner.peak import Estimate
from accessory.planner.search import Card, Fitting
from accessory.planner.setup import Setup


@dataclass(frozen=True)
class Model:
    """The model of a plan: a preset, or what a path's headers or configuration say."""

    name: str
    args: ModelArgs
    implementation: Implementation | None = None
    quant: Quant | None = None  # of a quantised folder
    nbytes: int | None = None  # of its files
    views: int = 0  # of an image; 0 for a model that takes none


@dataclass(frozen=True)
class Plan:
    """How much memory a task needs on each GPU, on the host and on disk, and which set-ups would fit. All in bytes."""

    model: Model
    setup: Setup
    estimate: Estimate  # of one GPU
    card: Card | None  # None: no GPU is here and the user named none
    setups: list[Fitting]  # the smallest ones that fit
    host: int
    disk: dict[str, int]

    @property
    def margin(self) -> int | None:
        """Bytes that a card has left; None without a card."""
        return None if self.card is None else self.card.nbytes - self.estimate.total

    @property
    def fits(self) -> bool | None:
        if self.card is None or self.margin is None:
            return None
        return self.margin >= 0 and (self.card.count is None or self.setup.gpus <= self.card.count)

    @property
    def encoder_parameters(self) -> int:
        """Parameters of the image encoders; 0 where the set-up loads none."""
        return sum(map(parameter_count, self.setup.args.sees_with.all)) if self.setup.views else 0
