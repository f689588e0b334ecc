"""The loop of a run: a step, its record, an evaluation and a state where they are due, and the end."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

from accessory.data.batches import Batch
from accessory.errors import InputError, listed
from accessory.train.config import FinetuneConfig
from accessory.train.nonfinite_trace import trace_nonfinite_items
from accessory.train.optim import learning_rate
from accessory.train.recorder import NullRecorder, Recorder
from accessory.train.resume import Start, StateSaver
from accessory.train.trainer import NotFiniteError, Trainer
from accessory.train.training_data import TrainingData

SHOWN = 8  # items that an error names


class TrainingLoop:
    """All steps of a run. Every rank runs the same loop, and all leave it after the same step."""

    def __init__(
        self,
        config: FinetuneConfig,
        data: TrainingData,
        trainer: Trainer,
        saver: StateSaver,
        recorder: Recorder | NullRecorder,
        start: Start,
    ) -> None:
        self.config, self.data, self.trainer = config, data, trainer
        self.saver, self.recorder = saver, recorder
        self.first, self.last = start.step, data.schedule.steps
        self.tokens = start.tokens

    def run(self, stop: threading.Event) -> None:
        """Train to the last step, which is evaluated and saved.

        Raises InputError where `stop` was set on any rank, after the state of a step is saved, and where a loss is not
        finite, with the items at fault.
        """
        if self.first == 0:
            self._evaluate(0)
        for index, batches in self.data.loader.steps(self.first):
            step = index + 1
            self.recorder.write(self._train(step, batches, stop))
            if step == self.last or self._evaluation_is_due(step):
                self._evaluate(step)
            stopping = self.trainer.stopping if self.trainer.mesh.size > 1 else stop.is_set()
            if step == self.last or stopping or self._state_is_due(step):
                self._save(step)
            if stopping and step < self.last:
                raise InputError(f"stopped by a signal after step {step}; its state is saved, go on with resume=auto")

    def _train(self, step: int, batches: list[Batch], stop: threading.Event) -> dict[str, Any]:
        """Make step `step` (from 1); returns its record."""
        schedule = self.data.schedule
        try:
            measured = self.trainer.step(batches, self._learning_rate(step), stop=stop.is_set)
        except NotFiniteError as error:
            self._save(step - 1)
            raise InputError(
                f"step {step}: {error}, {self._items_at_fault(step, batches)}; the state of step {step - 1} is saved "
                "and still good"
            ) from error
        self.tokens += measured["tokens"]
        return {
            "kind": "train",
            "step": step,
            "epoch": schedule.epoch_at(step),
            "samples": step * self.data.split.rows,
            **measured,
            "tokens": self.tokens,
        }

    def _learning_rate(self, step: int) -> float:
        """The rate of step `step`. Where `max_steps` ends the run early, warm-up and cosine both shrink."""
        config, schedule = self.config, self.data.schedule
        return learning_rate(
            schedule.epoch_at(step - 0.5),
            lr=config.lr,
            min_lr=config.min_lr,
            warmup_epochs=config.warmup_epochs * schedule.epochs / config.epochs,
            epochs=schedule.epochs,
        )

    def _save(self, step: int) -> None:
        """Save the state after `step` steps, and its records first: a machine that fails must not lose them alone."""
        self.recorder.sync()
        self.saver.save(step, self.tokens)

    def _evaluate(self, step: int) -> None:
        if self.data.held_out:
            loss, tokens = self.trainer.evaluate(self.data.held_out)
            self.recorder.write({"kind": "eval", "step": step, "loss": loss, "tokens": tokens})

    def _evaluation_is_due(self, step: int) -> bool:
        return self.config.eval_interval > 0 and step % self.config.eval_interval == 0

    def _state_is_due(self, step: int) -> bool:
        every, schedule = self.config.save_iteration_interval, self.data.schedule
        if every and step % every == 0:
            return True
        epochs = self.config.save_interval
        return bool(epochs) and schedule.ends_epoch(step) and (schedule.place(step - 1)[0] + 1) % epochs == 0

    def _items_at_fault(self, step: int, batches: list[Batch]) -> str:
        """The items whose loss is not finite, by file and line; where there are none, those of the whole step."""
        found = trace_nonfinite_items(self.trainer, batches, partial(self.data.loader.alone, step - 1))
        items = found or sorted({item for row in self.data.schedule.rows(step - 1) for item in row})
        shown = listed(map(self.data.dataset.where, items), SHOWN)
        return f"{'in' if found else 'somewhere in'} {shown}"
