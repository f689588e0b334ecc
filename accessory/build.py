"""The assembly of a network: `build`, from opened checkpoints to a decoder that holds their values, a line a step.

    meta → adapters → cast → cut → quantise → shard → fill → fuse

Inference and training both come this way. Until the values arrive, every step works on parameters without memory, so a
rank never holds more than its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from accessory.adapt.peft import AdapterSpec, adapter_specs_of, add_adapters, initial_tensor
from accessory.adapt.quant import quantize_skeleton
from accessory.checkpoint.folder import Checkpoint
from accessory.checkpoint.lazy import Computed, Lazy
from accessory.checkpoint.load import check_tensors, fill
from accessory.checkpoint.names import companion_of, image_shapes, is_encoder_tensor, is_of_images
from accessory.config import Implementation, ModelArgs
from accessory.formats import Quant
from accessory.nn.decoder import Decoder
from accessory.parallel.apply import parallelize
from accessory.parallel.fsdp import DataParallel, apply_fsdp
from accessory.parallel.local_shard import local_tensors
from accessory.parallel.mesh import DeviceMesh

if TYPE_CHECKING:
    from accessory.nn.vision import VisionTower


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """Which network: checkpoints, one loaded over the other, and what is made of them."""

    checkpoints: Sequence[Checkpoint]
    args: ModelArgs
    implementation: Implementation
    quant: Quant | None = None  # weights that are kept in fewer bits
    image_views: int = 0  # views of an image; 0: the network takes text alone


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """What of a network is trained, and how its training is spread over data-parallel ranks."""

    trainable: Callable[[str], bool]  # by a parameter's name in the network
    adapters: Mapping[str, AdapterSpec] = field(default_factory=dict)  # new ones, by the canonical name of their linear
    seed: int = 0  # new tensors are drawn from it
    data_parallel: DataParallel = "sdp"
    checkpointing: bool = False  # compute activations again in the backward pass


def build(
    spec: NetworkSpec,
    mesh: DeviceMesh | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    training: TrainingSpec | None = None,
    progress: bool = False,
) -> Decoder:
    """The network on `device`, in evaluation mode, its products in `dtype`.

    mesh: a rank holds its own slices, however many files the checkpoints are cut into, and reads no more of them.
    training: trained parameters are fp32 and need gradients, all others are frozen. New adapters and projections start
    with values that depend on the seed and their names alone. Without it, everything is frozen.

    A weight that a checkpoint holds quantised is copied as it lies; any other is quantised on arrival, some rows at a
    time. No tensor is held beside the parameters. Raises CheckpointError listing tensors that are missing, extra or
    misshapen, and ConfigError for sizes that cannot be cut or quantised.
    """
    mesh = mesh or DeviceMesh()
    tensors = _stored_tensors(spec)
    with torch.device("meta"):
        decoder = Decoder(spec.args, spec.implementation, sees=spec.image_views > 0)
        add_adapters(decoder, _adapter_specs(tensors, training), spec.args.lora_scale)
    decoder.cast(dtype).compute_in(dtype)
    _choose_trained(decoder, training)
    tensors |= _new_tensors(decoder, spec, training, tensors)
    check_tensors(decoder, tensors, where=", ".join(str(c.path) for c in spec.checkpoints))
    if mesh.model is not None:
        parallelize(decoder, mesh.model)
    if spec.quant is not None:
        quantize_skeleton(decoder, spec.quant)
    if training is not None:
        apply_fsdp(decoder, mesh, training.data_parallel, dtype)
    decoder.to_empty(device=device)
    decoder.fuse()  # before the values arrive, so that they are not copied twice
    fill(decoder, tensors, progress=progress)
    return decoder.eval()


def build_tower(
    spec: NetworkSpec, *, device: torch.device | str, dtype: torch.dtype, progress: bool = False
) -> VisionTower:
    """The image encoders of a network that sees, frozen and whole on every rank."""
    from accessory.checkpoint.vision import load_tower  # text alone starts without it

    stored = {name: tensor for c in spec.checkpoints for name, tensor in c.vision.items()}
    args = spec.args.sees_with
    return load_tower(args, spec.image_views, stored, device=device, dtype=dtype, progress=progress)


def _stored_tensors(spec: NetworkSpec) -> dict[str, Lazy]:
    """The canonical tensors of all checkpoints, without encoders; later ones replace earlier ones."""
    left_out = is_encoder_tensor if spec.image_views else is_of_images
    every = {name: tensor for checkpoint in spec.checkpoints for name, tensor in checkpoint.tensors.items()}
    return {name: tensor for name, tensor in every.items() if not left_out(name)}


def _adapter_specs(tensors: Mapping[str, Lazy], training: TrainingSpec | None) -> dict[str, AdapterSpec]:
    """The adapters that checkpoints hold, and the new ones."""
    stored = adapter_specs_of({name: tensor.shape for name, tensor in tensors.items()})
    new = training.adapters if training is not None else {}
    return {name: stored.get(name, AdapterSpec()) | new.get(name, AdapterSpec()) for name in {**stored, **new}}


def _choose_trained(decoder: Decoder, training: TrainingSpec | None) -> None:
    decoder.requires_grad_(False)
    if training is None:
        return
    for name, parameter in decoder.named_parameters():
        if training.trainable(name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    for layer in decoder.layers:
        layer.recompute = training.checkpointing  # type: ignore[assignment]


def _new_tensors(
    decoder: Decoder, spec: NetworkSpec, training: TrainingSpec | None, stored: Mapping[str, Lazy]
) -> dict[str, Lazy]:
    """Initial values of what is trained and no checkpoint holds: adapters, and what makes positions of images."""
    if training is None:
        return {}

    def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
        for shard in local_tensors(decoder):
            if training.adapters and companion_of(shard.name) is not None:
                yield shard.name, tuple(shard.tensor.shape)
        if spec.image_views:
            yield from ((name, shape) for name, shape in image_shapes(spec.args).items() if training.trainable(name))

    return {
        name: Computed(shape, torch.float32, partial(initial_tensor, name, shape, training.seed))
        for name, shape in shapes()
        if name not in stored
    }
