"""Assemble a network: `build` turns opened checkpoints into a decoder with their values, one line per step.

    meta → adapters → cast → cut → quantise → shard → fuse → fill

Inference and training both use it. Until the network is sharded, its parameters are on the meta device and take no
memory, so a rank never holds more than its own part.
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
from accessory.ops.machine import warn_of_slow_kernels
from accessory.parallel.apply import parallelize, share_rows, spread_experts
from accessory.parallel.fsdp import DataParallel, apply_fsdp, keep_gradients_in
from accessory.parallel.local_shard import local_tensors
from accessory.parallel.mesh import DeviceMesh
from accessory.planner.setup import Inference, Setup, Training

if TYPE_CHECKING:
    from accessory.nn.vision import VisionTower


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """The network to build: its checkpoints, loaded one over the other, and what to make of them."""

    checkpoints: Sequence[Checkpoint]
    args: ModelArgs
    implementation: Implementation
    quant: Quant | None = None  # formats of quantised weights; None: no weight is quantised
    image_views: int = 0  # views of an image; 0: the network takes text alone
    adapters: Mapping[str, Checkpoint] = field(default_factory=dict)  # by name, for requests to choose from

    def planned(
        self,
        task: Inference | Training,
        *,
        tp: int,
        dp: int,
        device: torch.device | str,
        dtype: torch.dtype,
        cp: int = 1,
        ep: int = 1,
    ) -> Setup:
        """What the planner is asked about this network on `tp` model-parallel × `dp` data-parallel ranks.

        cp, ep: how many of the data-parallel ranks share each row, and hold the experts together. ConfigError for sizes
        that cannot be sharded.
        """
        adapted = isinstance(task, Training) or any(companion_of(n) for c in self.checkpoints for n in c.tensors)
        if not adapted or (isinstance(task, Training) and task.kind != "lora"):
            args = self.args.replace(lora_rank=-1, bias_tuning=False)
        else:
            args = self.args
        return Setup(
            args=args,
            task=task,
            implementation=self.implementation,
            quant=self.quant or Quant(),
            tp=tp,
            dp=dp,
            cp=cp,
            ep=ep,
            views=self.image_views,
            device="cuda" if torch.device(device).type == "cuda" else "cpu",
            dense_bytes=dtype.itemsize,
        )


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """Which parameters of a network are trained, and how training is distributed over data-parallel ranks."""

    trainable: Callable[[str], bool]  # takes a parameter's name in the network
    adapters: Mapping[str, AdapterSpec] = field(default_factory=dict)  # new ones, by the canonical name of their linear
    seed: int = 0  # of the random values of new tensors
    data_parallel: DataParallel = "sdp"
    checkpointing: bool = False  # recompute activations in the backward pass
    gradient_dtype: torch.dtype = torch.float32  # of large parameters' gradients; those of norms and routers are fp32


def build(
    spec: NetworkSpec,
    mesh: DeviceMesh | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    training: TrainingSpec | None = None,
    progress: bool = False,
) -> Decoder:
    """Build the network on `device`, in evaluation mode. Its products run in `dtype`.

    mesh: each rank reads and holds only its local shards, for any number of checkpoint files. training: trained
    parameters are fp32 and require gradients; all others are frozen. New adapters and projections start with values
    that depend only on the seed and their names. Without `training`, all parameters are frozen.

    A weight that is already quantised in its checkpoint is copied unchanged. Other weights that `spec.quant` names are
    quantised while they are loaded, some rows at a time. Memory never holds a second copy of the weights. Raises
    CheckpointError listing tensors that are missing, extra or misshapen, and ConfigError for sizes that cannot be
    sharded or quantised.
    """
    mesh = mesh or DeviceMesh()
    if mesh.first and torch.device(device).type == "cuda":
        warn_of_slow_kernels()
    decoder, tensors = outline(spec, dtype=dtype, training=training)
    if mesh.model is not None and mesh.model.size > 1:
        parallelize(decoder, mesh.model)
    if mesh.context is not None:
        share_rows(decoder, mesh.context)
    if mesh.experts is not None:
        spread_experts(decoder, mesh.experts)
    if spec.quant is not None:
        quantize_skeleton(decoder, spec.quant)
    if training is not None:
        apply_fsdp(decoder, mesh, training.data_parallel, dtype, training.gradient_dtype)
    decoder.to_empty(device=device)
    if training is not None:
        keep_gradients_in(decoder, training.gradient_dtype)
    decoder.fuse()  # before the values arrive, so that they are not copied twice
    fill(decoder, tensors, progress=progress)
    return decoder.eval()


def outline(
    spec: NetworkSpec, *, dtype: torch.dtype = torch.bfloat16, training: TrainingSpec | None = None
) -> tuple[Decoder, dict[str, Lazy]]:
    """The whole network on the meta device, without memory, and the tensors that will fill it.

    Raises CheckpointError listing tensors that are missing, extra or misshapen.
    """
    tensors = _stored_tensors(spec)
    with torch.device("meta"):
        decoder = Decoder(spec.args, spec.implementation, sees=spec.image_views > 0)
        add_adapters(decoder, _adapter_specs(tensors, training), spec.args.lora_scale)
    decoder.cast(dtype).compute_in(dtype)
    _choose_trained(decoder, training)
    tensors |= _new_tensors(decoder, spec, training, tensors)
    check_tensors(decoder, tensors, where=", ".join(str(c.path) for c in spec.checkpoints))
    return decoder, tensors


def build_tower(
    spec: NetworkSpec, *, device: torch.device | str, dtype: torch.dtype, progress: bool = False
) -> VisionTower:
    """Build the image encoders of a network that takes images: frozen, and whole on every rank."""
    from accessory.checkpoint.vision import load_tower  # not imported for text alone

    stored = {name: tensor for c in spec.checkpoints for name, tensor in c.vision.items()}
    args = spec.args.sees_with
    return load_tower(args, spec.image_views, stored, device=device, dtype=dtype, progress=progress)


def _stored_tensors(spec: NetworkSpec) -> dict[str, Lazy]:
    """The canonical tensors of all checkpoints, without encoders; later ones replace earlier ones.

    Without image views, the projections to image tokens are left out too.
    """
    left_out = is_encoder_tensor if spec.image_views else is_of_images
    every = {name: tensor for checkpoint in spec.checkpoints for name, tensor in checkpoint.tensors.items()}
    return {name: tensor for name, tensor in every.items() if not left_out(name)}


def _adapter_specs(tensors: Mapping[str, Lazy], training: TrainingSpec | None) -> dict[str, AdapterSpec]:
    """The adapters in the checkpoints, and the new ones, by the canonical name of their linear."""
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
        layer.checkpoint_activations(training.checkpointing)  # type: ignore[operator]


def _new_tensors(
    decoder: Decoder, spec: NetworkSpec, training: TrainingSpec | None, stored: Mapping[str, Lazy]
) -> dict[str, Lazy]:
    """Initial values of trained tensors that no checkpoint holds: adapters, and projections to image tokens."""
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
