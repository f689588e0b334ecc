"""Everything a run consists of, opened, checked and built before its first step: `prepare`."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from accessory.build import build, build_tower
from accessory.data.batches import Batch
from accessory.data.dataset import FinetuneData
from accessory.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from accessory.data.transform import ImageLoader
from accessory.errors import ConfigError
from accessory.parallel.fsdp import DeviceMesh
from accessory.train.config import AUTO, FinetuneConfig
from accessory.train.feed import Feed, Schedule, Split
from accessory.train.metrics import METRICS_FILE, write_whole
from accessory.train.report import REPORT_FILE
from accessory.train.source import COMPUTE, Source, open_source, warn_of_biases
from accessory.train.state import Described, clean_states, complete_states, describe, load_state
from accessory.train.trainer import LossWeights, Trainer

STATES, FINAL, CONFIG = "states", "final", "config.yaml"


@dataclass
class Run:
    """Everything a run consists of, made before its first step."""

    config: FinetuneConfig
    mesh: DeviceMesh
    folder: Path
    source: Source
    data: FinetuneData
    schedule: Schedule
    feed: Feed
    trainer: Trainer
    held_out: Sequence[Batch]
    identity: dict[str, Any]  # of model and data, which a state is written with; made once, since it reads them all
    resumed: Described | None = None
    tokens: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def states(self) -> Path:
        return self.folder / STATES


def prepare(config: FinetuneConfig, mesh: DeviceMesh, device: torch.device) -> Run:
    """Open, check and build everything; what the folder holds is changed last, when nothing can be wrong any more."""
    folder = Path(config.output_dir)
    resumed = mesh.from_first(lambda: _open_folder(config, folder))
    source = open_source(config)
    identity = {"model": source.identity()}
    if resumed is not None:
        _check_same_model(resumed, identity["model"])
    split = Split(config.batch_size, config.accum_iter, mesh.data_size)
    if resumed is not None:
        split = Split.keeping(resumed.values["rows"], config.batch_size, mesh.data_size)
    if mesh.first:
        warn_of_biases(source)
    tokenizer = _tokenizer(config, source)
    check_vocabulary(tokenizer, source.args.vocab_size)
    data = _open_data(config.data_config, config, tokenizer, mesh, source.image_tokens)
    identity["data"] = _data_identity(data, config)
    if resumed is not None:
        _check_same_data(resumed, identity["data"])
    schedule = _schedule(config, data, split.rows, config.epochs, config.max_steps)
    if resumed is not None and resumed.step >= schedule.steps and not _is_of(resumed, folder):
        raise ConfigError(
            f"resume: {resumed.folder} has made all of {schedule.steps} steps; give more epochs or max_steps"
        )
    pin = config.pin_mem and device.type == "cuda"
    make_feed = partial(Feed, mesh=mesh, workers=config.num_workers, pin=pin, broken=config.broken_images)
    feed = make_feed(data, schedule, split, load=_loader(source, config.image_transform))
    held_out: Sequence[Batch] = []
    if config.eval_data:
        others = _open_data(config.eval_data, config, tokenizer, mesh, source.image_tokens)
        each = Split(config.batch_size, 1, mesh.data_size)
        # Whole images, as answering sees them, and not what a crop happens to leave.
        same = config.image_transform != "random_resized_crop"
        load = _loader(source, config.image_transform if same else "padded_resize")
        held_out = make_feed(others, _schedule(config, others, each.rows, 1.0), each, load=load).all_batches()
    how: dict[str, Any] = {"device": device, "dtype": COMPUTE[config.precision], "progress": mesh.first}
    decoder = build(source.network, mesh, training=source.training, **how)
    weights = LossWeights(source.args.load_balancing_weight, config.z_loss_weight, config.global_batch_statistics)
    tower = build_tower(source.network, **how) if source.views else None
    trainer = Trainer(decoder, mesh, weights, weight_decay=config.weight_decay, clip=config.clip_grad, tower=tower)
    run = Run(config, mesh, folder, source, data, schedule, feed, trainer, held_out, identity, resumed)
    if resumed is not None:
        load_state(trainer, resumed.folder)
        run.tokens = resumed.values["tokens"]
        trainer.loss_scale.value, trainer.loss_scale.good = resumed.values["loss_scale"]
    mesh.from_first(lambda: _claim_folder(config, folder, resumed))
    return run


def _open_folder(config: FinetuneConfig, folder: Path) -> Described | None:
    """Make the run's folder, see that it can be written, and find the state to go on from; on the first process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be written ({error.strerror})") from error
    resumed = _state_to_resume(config, folder)
    if not (folder / METRICS_FILE).exists() or config.overwrite:
        return resumed
    if resumed is None and config.resume != AUTO:
        raise ConfigError(
            f"output_dir: {folder} holds a run already; set resume=auto to go on with it, overwrite=true to begin "
            "anew, or another folder"
        )
    if resumed is not None and not _is_of(resumed, folder):
        raise ConfigError(f"output_dir: {folder} holds another run than resume = {config.resume}; give another folder")
    return resumed


def _is_of(state: Described, folder: Path) -> bool:
    return state.folder.resolve().parent == (folder / STATES).resolve()


def _claim_folder(config: FinetuneConfig, folder: Path, resumed: Described | None) -> None:
    """Clear away what an earlier run left and this one will write, and say what was asked for."""
    names = [f"{FINAL}.partial"]  # in a run's folder it is the run's, whatever was left of it
    if resumed is not None and _is_of(resumed, folder):
        clean_states(folder / STATES, later_than=resumed.step)
    else:
        names += [STATES, FINAL, f"{FINAL}.old"]
        (folder / REPORT_FILE).unlink(missing_ok=True)
    for name in names:
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    with write_whole(folder / CONFIG) as file:
        file.write(config.as_yaml().encode())


def _state_to_resume(config: FinetuneConfig, folder: Path) -> Described | None:
    if config.resume is None:
        return None
    if config.resume == AUTO:
        found = complete_states(folder / STATES)
        return describe(found[-1]) if found else None
    given = Path(config.resume)
    inside = complete_states(given / STATES) or complete_states(given)
    return describe(inside[-1] if inside else given)


def _check_same_model(resumed: Described, now: dict[str, Any]) -> None:
    before = resumed.values["model"]
    for key, what in (
        ("sizes", "is of a model of other sizes"),
        ("peft", "trained other adapters"),
        ("images", "saw images otherwise, or none"),
        ("train_router", "differs in whether the router is trained"),
        ("quant", "stands on a base quantised otherwise"),
        ("weights", "stands on other weights than pretrained_path holds"),
    ):
        if before.get(key) != now[key]:
            told = "" if key == "weights" else f": {_difference(before.get(key), now[key])}"
            raise ConfigError(f"resume: {resumed.folder} {what}{told}")


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        return ", ".join(f"{k} {before.get(k)!r} there, {now[k]!r} here" for k in now if before.get(k) != now[k])
    return f"{before!r} there, {now!r} here"


def _check_same_data(resumed: Described, now: dict[str, Any]) -> None:
    if resumed.values["data"] != now:
        raise ConfigError(
            f"resume: {resumed.folder} learnt from other data, or the same in another order (items, max_words, packing,"
            " template or seed differ); resume with what it began with, or begin a new run from its final folder"
        )


def _data_identity(data: FinetuneData, config: FinetuneConfig) -> dict[str, Any]:
    identity = {
        "items": len(data),
        "digest": data.fingerprint(),
        "max_words": config.max_words,
        "packing": config.packing,
        "seed": config.seed,
    }
    return identity | ({"image_transform": config.image_transform} if data.image_tokens else {})


def _tokenizer(config: FinetuneConfig, source: Source) -> Tokenizer:
    if config.tokenizer_path is not None:
        return load_tokenizer(config.tokenizer_path)
    for checkpoint in reversed(source.checkpoints[1:]):
        if any(checkpoint.path.glob("tokenizer.*")):
            return load_tokenizer(checkpoint.path)
    return load_tokenizer(source.checkpoints[0].path)


def _loader(source: Source, transform: str) -> ImageLoader | None:
    return ImageLoader.of(transform, source.vision.pixels(source.views)) if source.views else None


def _open_data(
    path: str, config: FinetuneConfig, tokenizer: Tokenizer, mesh: DeviceMesh, image_tokens: int
) -> FinetuneData:
    def opened(broken_images: Literal["fail", "skip"] | None) -> FinetuneData:
        return FinetuneData.open(
            Path(path),
            tokenizer,
            max_words=config.max_words,
            template=config.template,
            dialog=config.dialog,
            prompt_type=config.prompt_type,
            cache_ann_on_disk=config.cache_ann_on_disk,
            seed=config.seed,
            progress=mesh.first,
            image_tokens=image_tokens,
            broken_images=broken_images,
            once=mesh.from_first,
        )

    if config.cache_ann_on_disk:  # the others read what the first one has written
        mesh.from_first(lambda: len(opened(None)))
    return opened(config.broken_images)


def _schedule(
    config: FinetuneConfig, data: FinetuneData, rows: int, epochs: float, max_steps: int | None = None
) -> Schedule:
    return Schedule(
        data,
        rows=rows,
        max_words=config.max_words,
        packing=config.packing,
        seed=config.seed,
        epochs=epochs,
        max_steps=max_steps,
    )
