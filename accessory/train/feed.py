"""Which rows a run learns from, step by step, and this rank's share of each step.

What a step learns from follows from data, seed and the number of rows a step alone. Ranks only divide it: a run that
goes on with other ranks, or other micro-batches, sees the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from accessory.data.batches import Batch, EpochPlan, collate
from accessory.data.dataset import FinetuneData
from accessory.errors import ConfigError
from accessory.parallel.fsdp import Grid


@dataclass(frozen=True)
class Split:
    """How a step's rows are divided: `batch_size` rows × `accum_iter` micro-steps × data-parallel ranks."""

    batch_size: int
    accum_iter: int
    data_size: int

    @property
    def rows(self) -> int:
        return self.batch_size * self.accum_iter * self.data_size

    @classmethod
    def keeping(cls, rows: int, batch_size: int, data_size: int) -> Split:
        """A division of as many rows, of at most `batch_size` a micro-step: what a run resumed on other ranks needs."""
        if rows % data_size:
            raise ConfigError(
                f"resume: the run learns from {rows} rows a step, which {data_size} data-parallel ranks cannot share "
                "evenly; start a number of ranks that divides it"
            )
        own = rows // data_size
        largest = next(n for n in range(min(batch_size, own), 0, -1) if own % n == 0)
        return cls(largest, own // largest, data_size)


class Schedule:
    """The steps of a run: whole epochs, and a part of one where `epochs` is no whole number."""

    def __init__(
        self,
        data: FinetuneData,
        *,
        rows: int,
        max_words: int,
        packing: bool,
        seed: int,
        epochs: float,
        max_steps: int | None = None,
    ) -> None:
        self.plans: list[EpochPlan] = []
        self.lengths: list[int] = []  # steps taken of each epoch
        for epoch in range(math.ceil(epochs)):
            plan = EpochPlan(
                data.lengths,
                data.groups,
                rows_per_step=rows,
                max_words=max_words,
                packing=packing,
                seed=seed,
                epoch=epoch,
            )
            part = min(1.0, epochs - epoch)
            self.plans.append(plan)
            self.lengths.append(max(1, round(plan.steps * part)))
        self.epochs = epochs
        self.steps = sum(self.lengths)
        if max_steps is not None:
            self.steps = min(self.steps, max_steps)
        if not self.steps:
            raise ConfigError("data_config: there is nothing to learn from")

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, step in it) of a step counted from 0."""
        epoch = 0
        while epoch < len(self.lengths) - 1 and step >= self.lengths[epoch]:
            step -= self.lengths[epoch]
            epoch += 1
        return epoch, step

    def epoch_at(self, step: float) -> float:
        """How many epochs have passed after `step` steps."""
        epoch, within = self.place(int(step))
        return epoch + (within + step - int(step)) / self.plans[epoch].steps

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` steps are a whole number of epochs."""
        epoch, within = self.place(step - 1)
        return within + 1 == self.lengths[epoch]

    def rows(self, step: int) -> list[tuple[int, ...]]:
        epoch, within = self.place(step)
        return self.plans[epoch].rows(within)


class Feed:
    """This rank's micro-batches of each step; `workers` threads prepare the next ones meanwhile."""

    def __init__(
        self, data: FinetuneData, schedule: Schedule, split: Split, grid: Grid, *, workers: int = 0, pin: bool = False
    ) -> None:
        self.data, self.schedule, self.split, self.grid = data, schedule, split, grid
        self.workers, self.pin = workers, pin

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of step `step` (from 0)."""
        rows, B = self.schedule.rows(step), self.split.batch_size
        out = []
        for micro in range(self.split.accum_iter):
            first = (micro * self.split.data_size + self.grid.data_rank) * B
            out.append(self._collate(rows[first : first + B]))
        return out

    def _collate(self, rows: list[tuple[int, ...]]) -> Batch:
        items = [item for row in rows for item in row]
        batch = collate([[self.data.example(i) for i in row] for row in rows], items)
        return batch.pin_memory() if self.pin else batch

    def steps(self, first: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, its micro-batches) from step `first` to the last one."""
        if not self.workers:
            for step in range(first, self.schedule.steps):
                yield step, self.batches(step)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            ahead: list[Future[list[Batch]]] = []
            upcoming = iter(range(first, self.schedule.steps))
            for step in range(first, self.schedule.steps):
                while len(ahead) <= self.workers and (following := next(upcoming, None)) is not None:
                    ahead.append(pool.submit(self.batches, following))
                yield step, ahead.pop(0).result()

    def all_batches(self) -> list[Batch]:
        """Everything once, for evaluation; every data-parallel rank gets as many batches."""
        out: list[Batch] = []
        for step in range(self.schedule.steps):
            out += self.batches(step)
        return out
