"""What a run begins from (`find_start`), and what it saves to be resumed from (`StateSaver`).

`Start` is the beginning of a new run and `Resume` that of a run which goes on from a state. Both answer the same
questions, so no other code asks which of the two it has.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accessory.config import Implementation
from accessory.errors import ConfigError
from accessory.train.config import AUTO, FinetuneConfig
from accessory.train.dataloader import Split
from accessory.train.state import STATES, StateInfo, complete_states, load_state, read_state_info, save_state
from accessory.train.trainer import Trainer

log = logging.getLogger(__name__)


class Start:
    """The beginning of a new run: no step was made, and any model and data will do."""

    step = 0  # steps made before
    tokens = 0  # learnt from in those steps
    resumed_at: int | None = None  # records and states up to this step stay; None: none of them
    in_place = False  # whether the run goes on in the folder that it began in
    announcement = ""

    def split(self, batch_size: int, accum_iter: int, data_size: int) -> Split:
        """How a step's rows are divided. ConfigError where `data_size` ranks cannot share them evenly."""
        return Split(batch_size, accum_iter, data_size)

    def check_model(self, model: Mapping[str, Any]) -> None:
        """ConfigError where `model`, a `Source.identity()`, is another than the run began with."""

    def check_optimizer(self, kind: str) -> None:
        """ConfigError where the run began with another `optimizer`, whose moments are other numbers."""

    def check_data(self, data: Mapping[str, Any]) -> None:
        """ConfigError where `data`, a `TrainingData.identity`, is other than the run began with."""

    def check_steps(self, steps: int) -> None:
        """Compare the steps of the whole run with those of the run that goes on.

        ConfigError where a new folder would get a run of which no step is left. Another number of steps is a warning.
        """

    def load_into(self, trainer: Trainer) -> None:
        """Fill trained parameters, moments and loss scale. CheckpointError where the network trains other tensors."""


class Resume(Start):
    """The beginning of a run that goes on from `state`."""

    def __init__(self, state: StateInfo, *, in_place: bool) -> None:
        self.state, self.in_place = state, in_place
        self.step = self.resumed_at = state.step
        self.tokens = state.values["tokens"]
        self.announcement = f"going on from {state.folder}"

    def split(self, batch_size: int, accum_iter: int, data_size: int) -> Split:
        return Split.keeping(self.state.values["rows"], batch_size, data_size)

    def check_model(self, model: Mapping[str, Any]) -> None:
        before = self.state.values["model"]
        for key, what in (
            ("sizes", "is of a model of other sizes"),
            ("peft", "trained other adapters"),
            ("images", "saw images otherwise, or none"),
            ("train_router", "differs in whether the router is trained"),
            ("quant", "stands on a base quantised otherwise"),
            ("weights", "stands on other weights than pretrained_path holds"),
        ):
            if before.get(key) != model[key]:
                told = "" if key == "weights" else f": {_difference(before.get(key), model[key])}"
                raise ConfigError(f"resume: {self.state.folder} {what}{told}")

    def check_optimizer(self, kind: str) -> None:
        before = self.state.values.get("config", {}).get("optimizer", "adamw")  # states of older versions do not tell
        if before != kind:
            raise ConfigError(
                f"resume: {self.state.folder} holds moments of optimizer {before}, here {kind}; resume with {before}, "
                "or begin a new run from its final folder"
            )

    def check_data(self, data: Mapping[str, Any]) -> None:
        if self.state.values["data"] != data:
            raise ConfigError(
                f"resume: {self.state.folder} learnt from other data, or the same in another order (items, max_words, "
                "packing, template or seed differ); resume with what it began with, or begin a new run from its final "
                "folder"
            )

    def check_steps(self, steps: int) -> None:
        if self.step >= steps and not self.in_place:
            raise ConfigError(
                f"resume: {self.state.folder} has made all of {steps} steps; give more epochs or max_steps"
            )
        before = self.state.values.get("steps", steps)  # states of older versions do not tell
        if before != steps and self.step < steps:
            log.warning(
                "resume: %s is of a run of %d steps, and this one has %d: from step %d on lr is that of a run of %d",
                self.state.folder,
                before,
                steps,
                self.step + 1,
                steps,
            )

    def load_into(self, trainer: Trainer) -> None:
        load_state(trainer, self.state.folder)
        trainer.loss_scale.value, trainer.loss_scale.good = self.state.values["loss_scale"]


def find_start(resume: str | None, states: Path) -> Start:
    """Where a run begins whose own states lie in the folder `states`: at step 0, or at the state that `resume` means.

    resume: None, "auto" (the newest of the run's own states), or the path of a run's folder, of its states or of one
    state. Raises CheckpointError for a damaged state, and for a path that holds none.
    """
    if resume is None:
        return Start()
    if resume == AUTO:
        own = complete_states(states)
        return _resume(own[-1], states) if own else Start()
    given = Path(resume)
    inside = complete_states(given / STATES) or complete_states(given)
    return _resume(inside[-1] if inside else given, states)


def _resume(state: Path, states: Path) -> Resume:
    info = read_state_info(state)
    return Resume(info, in_place=info.folder.resolve().parent == states.resolve())


class StateSaver:
    """Writes a run's states into `folder`, each with the values that `Resume` reads.

    identity: "model", "data", "rows" and "steps", which all states of a run share.
    """

    def __init__(
        self,
        folder: Path,
        config: FinetuneConfig,
        trainer: Trainer,
        identity: Mapping[str, Any],
        implementation: Implementation,
        start: Start,
    ) -> None:
        self.folder, self.config, self.trainer = folder, config, trainer
        self.identity, self.implementation = identity, implementation
        self.newest = start.resumed_at

    def save(self, step: int, tokens: int) -> None:
        """Write the state after `step` steps, unless it is the newest one already. Every rank calls it."""
        if step == self.newest:
            return
        values = {
            **self.identity,
            "tokens": tokens,
            "updates": self.trainer.optimizer.updates,
            "loss_scale": [self.trainer.loss_scale.value, self.trainer.loss_scale.good],
            "implementation": self.implementation,
            "config": self.config.to_dict(),
        }
        save_state(self.trainer, self.folder, step, values, self.config.keep)
        self.newest = step


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        return ", ".join(f"{k} {before.get(k)!r} there, {now[k]!r} here" for k in now if before.get(k) != now[k])
    return f"{before!r} there, {now!r} here"
