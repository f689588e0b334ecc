"""What a run learns from and is evaluated on: from a recipe's files to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from accessory.data.batches import Batch
from accessory.data.dataset import FinetuneData
from accessory.data.tokenizer import Tokenizer
from accessory.data.transform import ImageLoader
from accessory.parallel.mesh import DeviceMesh
from accessory.train.config import FinetuneConfig
from accessory.train.dataloader import DataLoader, Schedule, Split
from accessory.train.preparation import Prepared
from accessory.train.source import Source


@dataclass(frozen=True)
class TrainingData:
    """The items of a run, the order in which it learns from them, and the held-out batches."""

    dataset: FinetuneData
    identity: dict[str, Any]  # what a run that resumes must have in common with this one
    loader: DataLoader
    held_out: Sequence[Batch]  # empty without eval_data

    @property
    def schedule(self) -> Schedule:
        return self.loader.schedule

    @property
    def split(self) -> Split:
        return self.loader.split


def open_training_data(ready: Prepared, mesh: DeviceMesh, device: torch.device) -> TrainingData:
    """Encode every item, and lay out all steps. Every rank calls it.

    Raises InputError with file and line for an item that cannot be used, ConfigError where the data do not suit the
    recipe, the model or the run that is resumed.
    """
    config, start, split = ready.config, ready.start, ready.split
    opener = _Opener(config, ready.source, mesh, device, ready.tokenizer)
    dataset = opener.dataset(config.data_config)
    identity = _identity(dataset, config)
    start.check_data(identity)
    schedule = opener.schedule(dataset, split, config.epochs, config.max_steps)
    start.check_steps(schedule.steps)
    loader = opener.loader(dataset, schedule, split, config.image_transform)
    held_out = _held_out_batches(opener, config.eval_data) if config.eval_data else []
    return TrainingData(dataset, identity, loader, held_out)


def _identity(dataset: FinetuneData, config: FinetuneConfig) -> dict[str, Any]:
    identity = {
        "items": len(dataset),
        "digest": dataset.fingerprint(),
        "max_words": config.max_words,
        "packing": config.packing,
        "seed": config.seed,
    }
    return identity | ({"image_transform": config.image_transform} if dataset.image_tokens else {})


def _held_out_batches(opener: _Opener, path: str) -> Sequence[Batch]:
    dataset = opener.dataset(path)
    split = Split(opener.config.batch_size, 1, opener.mesh.replicas)
    schedule = opener.schedule(dataset, split, epochs=1.0)
    # An evaluation shows whole images, as inference does, and not the part that a random crop leaves.
    transform = opener.config.image_transform
    transform = "padded_resize" if transform == "random_resized_crop" else transform
    return opener.loader(dataset, schedule, split, transform).all_batches()


@dataclass(frozen=True)
class _Opener:
    """Opens what a run learns from and what is held out in the same way."""

    config: FinetuneConfig
    source: Source
    mesh: DeviceMesh
    device: torch.device
    tokenizer: Tokenizer

    def dataset(self, path: str) -> FinetuneData:
        if self.config.cache_ann_on_disk:  # the first process writes the cache, and the others read it
            self.mesh.from_first(lambda: len(self._encode(path, None)))
        return self._encode(path, self.config.broken_images)

    def _encode(self, path: str, broken_images: Literal["fail", "skip"] | None) -> FinetuneData:
        return FinetuneData.open(
            Path(path),
            self.tokenizer,
            max_words=self.config.max_words,
            template=self.config.template,
            dialog=self.config.dialog,
            prompt_type=self.config.prompt_type,
            cache_ann_on_disk=self.config.cache_ann_on_disk,
            seed=self.config.seed,
            progress=self.mesh.first,
            image_tokens=self.source.image_tokens,
            broken_images=broken_images,
            once=self.mesh.from_first,
        )

    def schedule(self, dataset: FinetuneData, split: Split, epochs: float, max_steps: int | None = None) -> Schedule:
        return Schedule(
            dataset,
            rows=split.rows,
            max_words=self.config.max_words,
            packing=self.config.packing,
            seed=self.config.seed,
            epochs=epochs,
            max_steps=max_steps,
        )

    def loader(self, dataset: FinetuneData, schedule: Schedule, split: Split, transform: str) -> DataLoader:
        source = self.source
        return DataLoader(
            dataset,
            schedule,
            split,
            self.mesh,
            workers=self.config.num_workers,
            pin=self.config.pin_mem and self.device.type == "cuda",
            load=ImageLoader.of(transform, source.vision.pixels(source.views)) if source.views else None,
            broken=self.config.broken_images,
        )
