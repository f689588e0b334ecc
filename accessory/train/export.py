"""From a run's state to a checkpoint folder like any other, which `MetaModel` loads and every command takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from accessory.checkpoint.chain import trained_on
from accessory.checkpoint.folder import Checkpoint
from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.save import write_checkpoint
from accessory.checkpoint.weight_files import find_resources
from accessory.config import Implementation, ModelArgs
from accessory.data.tokenizer_files import files_with_template
from accessory.parallel.sharding import expert_tensor, largest_world
from accessory.train.state import trained_tensors


def canonical_tensors(state: Path) -> dict[str, Lazy]:
    """The trained tensors of a state under canonical names, one tensor an expert. They are lazy."""
    out: dict[str, Lazy] = {}
    for name, tensor in trained_tensors(state):
        if expert_tensor(name, 0) is None:
            out[name] = tensor
        else:
            for e in range(tensor.shape[0]):
                out[str(expert_tensor(name, e))] = tensor.select(0, e)
    return out


def export(
    state: Path,
    dst: Path,
    checkpoints: Sequence[Checkpoint],
    args: ModelArgs,
    implementation: Implementation,
    *,
    only_trained: bool = False,
    dtype: torch.dtype | None = None,
    shards: int = 1,
    image_views: int = 0,
    tokenizer: Path | None = None,
    chat_template: str | None = None,
) -> Path:
    """Write a state's parameters to `dst` in the accessory layout, together with those of `checkpoints`.

    checkpoints: what the run started from; a trained tensor replaces theirs. only_trained: leave out all others; the
    folder is then loaded behind the one that it was trained on, whose hash it keeps. dtype: of the tensors; None:
    trained ones stay in fp32. shards: at most so many files, fewer where the sizes do not divide. tokenizer: the folder
    or file of the run's own tokenizer; None: that of the checkpoints. chat_template: Jinja that the tokenizer
    gets; None: it keeps what it has.
    """
    trained = canonical_tensors(state)
    tensors: dict[str, Lazy] = {}
    if not only_trained:
        for checkpoint in checkpoints:
            checkpoint.warn_of_dequantizing()
            tensors |= checkpoint.tensors
    tensors |= trained
    if image_views and not only_trained:
        from accessory.checkpoint.vision import with_encoders

        tensors = with_encoders(tensors, args)
    resources = {r.name: r for c in checkpoints for r in find_resources(c.path)}
    if tokenizer is not None:
        own = find_resources(tokenizer) if tokenizer.is_dir() else [tokenizer]
        kept = {n: r for n, r in resources.items() if n == "generation_config.json"}  # the others are a tokenizer's
        resources = kept | {r.name: r for r in own}
    write_checkpoint(
        dst,
        tensors,
        args.replace(trainable_mode=ModelArgs.trainable_mode),  # a later run says its own
        to=implementation,
        shards=largest_world(args, implementation, at_most=shards),
        dtype=dtype,
        resources=list(resources.values()),
        texts={} if chat_template is None else files_with_template(chat_template, resources.values()),
        overwrite=True,
        allow_partial=only_trained,
        trained_on=trained_on(checkpoints, tensors) if only_trained else None,
        image_views=max(image_views, *(c.llama_type.image_views for c in checkpoints)),
    )
    return dst
