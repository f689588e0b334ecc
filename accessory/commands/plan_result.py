"""The result of `accessory plan`: a `Plan`, which `plan` computes and `plan_view` shows."""

from __future__ import annotations

from dataclasses import dataclass

from accessory.config import Implementation, ModelArgs
from accessory.formats import Quant
from accessory.planner.cards import Card
from accessory.planner.encoders import parameter_count
from accessory.planner.peak import Estimate
from accessory.planner.search import Fitting
from accessory.planner.setup import Setup


@dataclass(frozen=True)
class Model:
    """The model of a plan, from a preset or from the headers or the configuration at a path."""

    name: str
    args: ModelArgs
    implementation: Implementation | None = None
    quant: Quant | None = None  # the formats of a quantised folder
    nbytes: int | None = None  # bytes of its files
    views: int = 0  # views of an image; 0 for a model without images


@dataclass(frozen=True)
class Plan:
    """The bytes that a task needs on each GPU, on the host and on disk, and the set-ups that would fit."""

    model: Model
    setup: Setup
    estimate: Estimate  # the memory of one GPU
    card: Card | None  # None: this machine has no GPU and the user named none
    setups: list[Fitting]  # the smallest set-ups that fit
    host: int  # bytes
    disk: dict[str, int]  # bytes

    @property
    def margin(self) -> int | None:
        """Bytes that a card has left, negative where the task needs more; None without a card."""
        return None if self.card is None else self.card.nbytes - self.estimate.total

    @property
    def fits(self) -> bool | None:
        """Whether the task fits the cards and their number; None without a card."""
        if self.card is None or self.margin is None:
            return None
        return self.margin >= 0 and (self.card.count is None or self.setup.gpus <= self.card.count)

    @property
    def encoder_parameters(self) -> int:
        """Parameters of the image encoders; 0 where the set-up loads none."""
        return sum(map(parameter_count, self.setup.args.sees_with.all)) if self.setup.views else 0
