"""Chains of checkpoints, loaded one over the other: a whole model, then adapters or other saves of trained tensors."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import torch.distributed as dist

from accessory.checkpoint.folder import Checkpoint, open_checkpoint
from accessory.checkpoint.hub import resolve
from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.names import companion_of
from accessory.checkpoint.trained_on import BETWEEN, TrainedOn, base_hash
from accessory.checkpoint.weight_files import IS_PEFT, PEFT_CONFIG
from accessory.config import PEFT_FIELDS, ModelArgs
from accessory.errors import CheckpointError, ConfigError
from accessory.formats import Quant

log = logging.getLogger(__name__)

_SIZES = "dim hidden_dim head_dim n_layers n_heads n_kv_heads vocab_size moe".split()


def open_chain(
    paths: Sequence[str | Path], config_files: Sequence[str | Path] = (), *, refuse_other_base: bool = False
) -> list[Checkpoint]:
    """Open folders (or hf:// addresses) to load one over the other; the first one is a whole model.

    An adapter may say which model it was trained on. If that is another one than lies below it, the first rank logs a
    warning; with `refuse_other_base` it is a CheckpointError.

    Raises as `open_checkpoint` does, and CheckpointError for folders that do not belong together or a PEFT adapter.
    """
    folders = [Path(resolve(path)) for path in paths]
    for folder in folders:
        if (folder / PEFT_CONFIG).is_file():
            raise CheckpointError(f"{folder}: {IS_PEFT}")
    checkpoints = [open_checkpoint(folders[0], config_files)]
    for folder in folders[1:]:
        checkpoints.append(open_over(checkpoints, folder, config_files, refuse_other_base=refuse_other_base))
    return checkpoints


def open_over(
    below: Sequence[Checkpoint],
    folder: Path,
    config_files: Sequence[str | Path] = (),
    *,
    refuse_other_base: bool = False,
) -> Checkpoint:
    """Open a folder to load it over the checkpoints `below`. It raises and warns as `open_chain` does."""
    if (folder / PEFT_CONFIG).is_file():
        raise CheckpointError(f"{folder}: {IS_PEFT}")
    first = below[0]
    # A save of trained tensors may have no configuration; then that of the first folder applies.
    own = _configs_in(folder) or _configs_in(first.path)
    checkpoint = open_checkpoint(folder, [*own, *config_files], allow_partial=True)
    for name in _SIZES:
        given, wanted = getattr(checkpoint.args, name), getattr(first.args, name)
        if given != wanted:
            raise CheckpointError(f"{folder}: {name}: got {given}, but {first.path} has {wanted}: another model's")
    problem = _other_base(checkpoint, below)
    if problem and refuse_other_base:
        raise CheckpointError(f"{problem}; give the model that it was trained on, or --allow-other-base")
    if problem and not (dist.is_initialized() and dist.get_rank() > 0):
        log.warning("%s", problem)
    return checkpoint


def trained_on(below: Sequence[Checkpoint], own: Collection[str]) -> TrainedOn:
    """What an adapter with the tensors `own`, trained over these checkpoints, says of them.

    Adapters below it that it replaces wholly do not count: the network is the same without them.
    """
    kept = [c for n, c in enumerate(below) if n == 0 or not c.tensors.keys() <= set(own)]
    tensors: dict[str, Lazy] = {}
    for checkpoint in kept:
        tensors |= checkpoint.tensors
    return TrainedOn(BETWEEN.join(c.name for c in kept), base_hash(tensors))


def _other_base(adapter: Checkpoint, below: Sequence[Checkpoint]) -> str | None:
    """A sentence if `adapter` says that it was trained on another model than `below`."""
    if adapter.trained_on is None:
        return None
    own, here = adapter.trained_on, trained_on(below, adapter.tensors)
    if own.hash == here.hash:
        return None
    return (
        f"{adapter.path}: was trained on {own.name} (norms and routers of hash {own.hash[:12]}…), but {here.name} is "
        f"another model ({here.hash[:12]}…), to which its numbers may mean nothing"
    )


def _configs_in(folder: Path) -> list[Path]:
    return [folder / name for name in ("params.json", "config.json") if (folder / name).is_file()]


def chained_args(checkpoints: Sequence[Checkpoint]) -> ModelArgs:
    """The configuration of a chain of checkpoints.

    Sizes come from the first checkpoint, PEFT fields from the last one with adapters, and image encoders from the last
    one that configures them. CheckpointError if LoRA adapters of two checkpoints stay in use with different scales.
    """
    args = checkpoints[0].args
    vision = next((c.args.vision for c in reversed(checkpoints) if c.args.vision is not None), None)
    published = any(c.args.load_pretrained_visual_encoder for c in checkpoints)
    args = args.replace(vision=vision, load_pretrained_visual_encoder=published)
    adapter: Checkpoint | None = None
    for checkpoint in checkpoints:
        lora = {name for name in checkpoint.tensors if name.endswith(".lora_a.weight")}
        if not lora and not any(companion_of(name) for name in checkpoint.tensors):
            continue
        own = checkpoint.args
        if adapter is not None and lora and own.lora_scale != args.lora_scale:
            left = [n for n in adapter.tensors if n.endswith(".lora_a.weight") and n not in lora]
            if left:
                raise CheckpointError(
                    f"{adapter.path}: scales LoRA by {args.lora_scale:g}, {checkpoint.path} by {own.lora_scale:g}; "
                    "merge the first into the weights before the second is loaded"
                )
        adapter = checkpoint
        args = args.replace(**{field: getattr(own, field) for field in PEFT_FIELDS})
    return args


def chained_quant(checkpoints: Sequence[Checkpoint], chosen: Quant | None) -> Quant | None:
    """The quantisation formats of a chain: those of a quantised folder in it, otherwise `chosen`.

    ConfigError if `chosen` differs from the formats of the quantised folder.
    """
    own = next((c for c in reversed(checkpoints) if c.quant is not None), None)
    if own is None or own.quant is None:
        return chosen
    if chosen not in (None, own.quant):
        raise ConfigError(
            f"quant: {own.path} is quantised already ({own.quant}), so it cannot be loaded as "
            f"{chosen or own.quant}; leave quant out, or give the folder that it was made from"
        )
    return own.quant
