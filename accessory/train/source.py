"""What a run starts from: its checkpoints, opened, and which network is trained of them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from accessory.adapt.peft import adapter_specs_for, trainable_rule
from accessory.build.network import NetworkSpec, TrainingSpec
from accessory.checkpoint.chain import chained_args, chained_quant, open_chain
from accessory.checkpoint.folder import Checkpoint
from accessory.config import PEFT_FIELDS, LlamaType, ModelArgs
from accessory.errors import ConfigError
from accessory.formats import Quant
from accessory.nn.decoder import Decoder
from accessory.parallel.local_shard import local_parameters
from accessory.parallel.sharding import check_ranks
from accessory.train.config import FinetuneConfig
from accessory.vision_config import VisionArgs

log = logging.getLogger(__name__)

COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class Source:
    """The opened checkpoints a run starts from, and what is to be made of them."""

    checkpoints: list[Checkpoint]
    args: ModelArgs
    kind: LlamaType
    config: FinetuneConfig
    quant: Quant | None = None  # of the frozen base: what the config says, or the folder holds
    views: int = 0  # of an image; 0: the run is of text alone

    @property
    def vision(self) -> VisionArgs:
        return self.args.sees_with

    @property
    def image_tokens(self) -> int:
        """Positions that an image takes; 0 where there are none."""
        return self.vision.image_tokens(self.views) if self.views else 0

    @property
    def trainable(self) -> Callable[[str], bool]:
        return trainable_rule(self.args, self.kind.peft, self.config.train_router)

    @property
    def network(self) -> NetworkSpec:
        return NetworkSpec(
            checkpoints=self.checkpoints,
            args=self.args,
            implementation=self.kind.implementation,
            quant=self.quant,
            image_views=self.views,
        )

    @property
    def training(self) -> TrainingSpec:
        return TrainingSpec(
            trainable=self.trainable,
            adapters=adapter_specs_for(self.args) if self.kind.peft else {},
            seed=self.config.seed,
            data_parallel=self.config.data_parallel,
            checkpointing=self.config.checkpointing,
            gradient_dtype=torch.bfloat16 if self.config.gradient_dtype == "bf16" else torch.float32,
        )

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that wrote a state: sizes, what is trained, and whose
        weights it stands on, by the norms and routers, which every layout stores alike."""
        sizes = self.args.to_dict()
        told = {k: sizes[k] for k in "dim hidden_dim head_dim n_layers n_heads n_kv_heads vocab_size moe".split()}
        digest = hashlib.sha256()
        for checkpoint in self.checkpoints:
            for name in sorted(n for n in checkpoint.tensors if n.endswith(("norm.weight", "gate.weight"))):
                for block in checkpoint.tensors[name].to(torch.float32).blocks():
                    digest.update(name.encode() + block.numpy().tobytes())
        images = None
        if self.views:
            images = {"views": self.views, "trainable_mode": self.args.trainable_mode, **self.vision.to_dict()}
        peft = {f: _plain(getattr(self.args, f)) for f in PEFT_FIELDS} if self.kind.peft else None
        return {
            "sizes": told,
            "peft": peft,
            "images": json.loads(json.dumps(images)),
            "train_router": self.config.train_router,
            "quant": None if self.quant is None else self.quant.to_dict(),
            "weights": digest.hexdigest(),
        }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def open_source(config: FinetuneConfig) -> Source:
    """Open what `pretrained_path` names, and settle what kind of network is trained.

    Raises CheckpointError and ConfigError as opening does, and ConfigError for adapters with nothing to train.
    """
    checkpoints = open_chain(config.pretrained_path, config.llama_config)
    args = chained_args(checkpoints)
    changes = {f: getattr(config, f) for f in PEFT_FIELDS if getattr(config, f) is not None}
    for field in ("load_balancing_weight", "trainable_mode"):
        if getattr(config, field) is not None:
            changes[field] = getattr(config, field)
    args = args.replace(**changes)
    kind = LlamaType.parse(config.llama_type) if config.llama_type else checkpoints[-1].llama_type
    wants = args.lora_rank > 0 or args.bias_tuning
    if wants and not kind.peft and any(getattr(config, f) is not None for f in ("lora_rank", "bias_tuning")):
        kind = LlamaType(kind.implementation, True, kind.image_views)
    views = 0 if config.no_visual else kind.image_views
    if args.trainable_mode == "mm_stage1" and not views:
        raise ConfigError(
            f"trainable_mode: got mm_stage1, which trains only what makes words of images, but {kind} takes none; give "
            f"llama_type {kind}_ens, or leave it out"
        )
    quant = chained_quant(checkpoints, Quant.parse(config.quant, config.quant_attention, config.quant_output))
    if quant is not None and not kind.peft and args.trainable_mode != "mm_stage1":
        held = [str(c.path) for c in checkpoints if c.quant is not None]
        given = f"{held[-1]} is quantised" if held else f"got {quant}"
        raise ConfigError(
            f"quant: {given}, but quantised weights cannot be trained; set lora_rank, bias_tuning or norm_tuning, or "
            + ("start from the folder that it was made from" if held else "leave quant out")
        )
    source = Source(checkpoints, args, kind, config, quant, views)
    if kind.peft and not (views or wants or args.norm_tuning or config.train_router):
        raise ConfigError(
            f"llama_type {kind}: nothing would be trained; set lora_rank, bias_tuning, norm_tuning or train_router"
        )
    check_ranks(args, kind.implementation, config.model_parallel_size)
    if args.moe.num_experts % config.expert_parallel_size:
        raise ConfigError(
            f"expert_parallel_size: got {config.expert_parallel_size}, but it must divide moe.num_experts, "
            f"{args.moe.num_experts}"
        )
    if views and config.context_parallel_size > 1:
        raise ConfigError(
            f"context_parallel_size: got {config.context_parallel_size}, but ranks cannot share rows with images; give "
            "1, or no_visual=true to train on text alone"
        )
    return source


def counts(decoder: Decoder) -> tuple[int, int]:
    """(trained, all) parameters of the whole network."""
    learning = {name for name, p in decoder.named_parameters() if p.requires_grad}
    sizes = {held.name: torch.Size(held.whole).numel() for held in local_parameters(decoder)}
    return sum(n for name, n in sizes.items() if name in learning), sum(sizes.values())


def warn_of_biases(source: Source) -> None:
    if source.kind.peft and source.args.bias_tuning:
        log.warning(
            "bias_tuning: Hugging Face's Mixtral has no biases, so the result can be served and merged here but never "
            "become a Hugging Face model; leave bias_tuning out if it has to"
        )
