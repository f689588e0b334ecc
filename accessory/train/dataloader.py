"""The steps of a run: the rows of each one, and this rank's batches of them, images included.

A dataset has items. A row holds one item or, packed, several, each a document of its own. A step learns from a fixed
number of rows. Which rows those are follows from the data, the seed and that number. Ranks only divide them: a run that
resumes with other ranks or micro-batches sees the same rows in each step, and the same crop of each image.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, overload

from torch import Tensor

from accessory.data.batches import Batch, EpochPlan, collate
from accessory.data.dataset import Example, FinetuneData
from accessory.data.transform import ImageLoader
from accessory.errors import ConfigError, InputError
from accessory.launch.speaking import OF_ONE_RANK
from accessory.ops.shared_rows import places_of
from accessory.parallel.mesh import DeviceMesh

log = logging.getLogger(__name__)


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
        """Divide `rows` rows a step, at most `batch_size` of them a micro-step.

        A run that resumes on other ranks keeps its rows a step. ConfigError where the ranks cannot share them evenly.
        """
        if rows % data_size:
            raise ConfigError(
                f"resume: the run learns from {rows} rows a step, which {data_size} data-parallel ranks cannot share "
                "evenly; start a number of ranks that divides it"
            )
        own = rows // data_size
        largest = next(n for n in range(min(batch_size, own), 0, -1) if own % n == 0)
        return cls(largest, own // largest, data_size)


class Schedule:
    """The rows of every step: of whole epochs, and of a part of one where `epochs` is no whole number."""

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
            if max_steps is not None and sum(self.lengths) >= max_steps:
                break
        self.seed = seed
        self.steps = sum(self.lengths)
        if max_steps is not None:
            self.steps = min(self.steps, max_steps)
        if not self.steps:
            raise ConfigError("data_config: there is nothing to learn from")

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of step `step`, all counted from 0."""
        epoch = 0
        while epoch < len(self.lengths) - 1 and step >= self.lengths[epoch]:
            step -= self.lengths[epoch]
            epoch += 1
        return epoch, step

    def epoch_at(self, step: float) -> float:
        """How many epochs have passed after `step` steps."""
        epoch, within = self.place(int(step))
        return epoch + (within + step - int(step)) / self.plans[epoch].steps

    @property
    def epochs(self) -> float:
        """How many epochs all steps are."""
        return self.epoch_at(self.steps)

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` steps are a whole number of epochs."""
        epoch, within = self.place(step - 1)
        return within + 1 == self.lengths[epoch]

    def rows(self, step: int) -> list[tuple[int, ...]]:
        """The rows of step `step` (from 0), each as the numbers of its items."""
        epoch, within = self.place(step)
        return self.plans[epoch].rows(within)


class DataLoader:
    """This rank's micro-batches of each step; `workers` threads prepare the next ones meanwhile.

    Ranks that share rows collate the same batch, and each takes its part of every row.

    load: makes pixels of an item's image; needed where items have images. A random crop follows from the schedule's
    seed, the epoch and the item, whatever the rank and the thread. broken: what happens where an image cannot be
    decoded. "fail" raises InputError with file and line. "skip" keeps the item, so that the steps of all ranks stay the
    same, gives it a grey image, and lets nothing be learnt of it.
    """

    def __init__(
        self,
        data: FinetuneData,
        schedule: Schedule,
        split: Split,
        mesh: DeviceMesh,
        *,
        workers: int = 0,
        pin: bool = False,
        load: ImageLoader | None = None,
        broken: Literal["fail", "skip"] = "fail",
    ) -> None:
        self.data, self.schedule, self.split, self.mesh = data, schedule, split, mesh
        self.workers, self.pin, self.load, self.broken = workers, pin, load, broken
        self._warned: set[int] = set()

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of step `step` (from 0)."""
        return [self.batch(step, micro) for micro in range(self.split.accum_iter)]

    def batch(self, step: int, micro: int) -> Batch:
        """Micro-batch number `micro` of a step."""
        first = (micro * self.split.data_size + self.mesh.replica) * self.split.batch_size
        return self._collate(step, self.schedule.rows(step)[first : first + self.split.batch_size])

    def alone(self, step: int, item: int) -> Batch:
        """One item in a batch of its own, as it is in step `step`."""
        return self._collate(step, [(item,)])

    def _collate(self, step: int, rows: Sequence[tuple[int, ...]]) -> Batch:
        pixels: list[Tensor] = []
        examples = [[self._example(step, item, pixels) for item in row] for row in rows]
        sharers = self.mesh.context_size
        items = [item for row in rows for item in row]
        batch = collate(examples, items, pixels=pixels, multiple=2 * sharers if sharers > 1 else 1)
        if sharers > 1:
            batch = batch.part(places_of(batch.tokens_BT.shape[1], self.mesh.context_rank, sharers))
        return batch.pin_memory() if self.pin else batch

    def _example(self, step: int, item: int, pixels: list[Tensor]) -> Example:
        """One item. The pixels of its image, if it has one, are appended to `pixels`."""
        example = self.data.example(item)
        if not example.places or example.image is None:
            return example
        if self.load is None:
            raise InputError(
                f"{self.data.where(item)}: image: there is nothing that loads it; give DataLoader a `load`"
            )
        epoch, _ = self.schedule.place(step)
        try:
            pixels.append(self.load(example.image, Random(f"{self.schedule.seed} {epoch} {item}")))
        except InputError as error:
            told = f"{self.data.where(item)}: image: {error}"
            if self.broken == "fail":
                raise InputError(f"{told}; broken_images=skip goes on without it") from error
            if item not in self._warned and self.mesh.model_rank == 0:  # model-parallel ranks have the same items
                self._warned.add(item)
                log.warning("broken_images: %s; nothing is learnt of this item", told, extra=OF_ONE_RANK)
            pixels.append(self.load.grey())
            return replace(example, learn=[False] * len(example.learn))
        return example

    def steps(self, first: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, its micro-batches) from step `first` to the last one, both counted from 0."""
        if not self.workers:
            for step in range(first, self.schedule.steps):
                yield step, self.batches(step)
            return
        micros = self.split.accum_iter
        upcoming = ((step, micro) for step in range(first, self.schedule.steps) for micro in range(micros))
        ahead: deque[Future[Batch]] = deque()
        pool = ThreadPoolExecutor(self.workers)
        try:
            for step in range(first, self.schedule.steps):
                # Threads run ahead by micro-batches, not by steps, since a step may hold many of them.
                while len(ahead) < micros + self.workers and (following := next(upcoming, None)) is not None:
                    ahead.append(pool.submit(self.batch, *following))
                yield step, [ahead.popleft().result() for _ in range(micros)]
        finally:
            pool.shutdown(cancel_futures=True)

    def all_batches(self) -> AllBatches:
        """All rows once, for an evaluation. Every data-parallel rank gets the same number of batches."""
        return AllBatches(self)


class AllBatches(Sequence[Batch]):
    """All batches of a loader, made anew in every pass, since the pixels of a whole dataset fit into no memory."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return self.loader.schedule.steps * self.loader.split.accum_iter

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.loader.batch(*divmod(range(len(self))[index], self.loader.split.accum_iter))

    def __iter__(self) -> Iterator[Batch]:
        for _, batches in self.loader.steps(0):
            yield from batches
