"""Parameter-efficient finetuning: LoRA (arXiv 2106.09685), biases (BitFit, arXiv 2106.10199), norms.

LoRA and biases are added to the product of a linear, in the same way in both implementations. Those of experts are
stacked like the experts' weights and run as grouped products too. A mapping from canonical names of linears
("layers.0.attention.wq", "layers.0.feed_forward.experts.3.w1") to `AdapterSpec`s says which linear has which adapter.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.config import LORA_TARGETS, ModelArgs
from accessory.errors import ConfigError
from accessory.nn.decoder import Decoder
from accessory.nn.experts import StackedExperts
from accessory.nn.linear import Linear
from accessory.vision_config import PROJECTION

_ADAPTER = re.compile(r"(.+)\.(bias|lora_a\.weight|lora_b\.weight)")
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(w[123])")
_TRAINED = {
    "lora": re.compile(r".*[._]lora_[ab](\.weight)?"),
    "bias": re.compile(r".*[._]bias"),
    "norm": re.compile(r"(.*[._])?norm\.weight"),
    "router": re.compile(r".*\.gate\..*"),
}


@dataclass(frozen=True)
class AdapterSpec:
    """The adapter of one linear: LoRA, a bias, or both."""

    rank: int = 0  # of LoRA; 0: none
    bias: bool = False

    def __or__(self, other: AdapterSpec) -> AdapterSpec:
        return AdapterSpec(max(self.rank, other.rank), self.bias or other.bias)


def adapter_specs_for(args: ModelArgs) -> dict[str, AdapterSpec]:
    """The adapters that a configuration asks for, by the canonical name of their linear.

    LoRA of `lora_rank` goes to `lora_targets`. With `bias_tuning`, biases go to all linears of attention and experts.
    """
    wanted: dict[str, AdapterSpec] = {}
    for kind in (*LORA_TARGETS, "gate", "output"):
        rank = args.lora_rank if args.lora_rank > 0 and kind in args.lora_targets else 0
        spec = AdapterSpec(rank, args.bias_tuning and kind in LORA_TARGETS)
        if spec != AdapterSpec():
            wanted |= dict.fromkeys(_linears(kind, args), spec)
    return wanted


def _linears(kind: str, args: ModelArgs) -> list[str]:
    if kind == "output":
        return [kind]
    if kind == "gate":
        return [f"layers.{i}.feed_forward.gate" for i in range(args.n_layers)]
    if kind in ("w1", "w2", "w3"):
        pairs = ((i, e) for i in range(args.n_layers) for e in range(args.moe.num_experts))
        return [f"layers.{i}.feed_forward.experts.{e}.{kind}" for i, e in pairs]
    return [f"layers.{i}.attention.{kind}" for i in range(args.n_layers)]


def adapter_specs_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, AdapterSpec]:
    """The adapters that have canonical tensors of these names and shapes, by the name of their linear."""
    found: dict[str, AdapterSpec] = {}
    for name, shape in shapes.items():
        match = _ADAPTER.fullmatch(name)
        if match is None or PROJECTION.fullmatch(name):
            continue
        before = found.get(match[1], AdapterSpec())
        rank = {"lora_a.weight": 0, "lora_b.weight": -1}.get(match[2])
        found[match[1]] = before | AdapterSpec(0 if rank is None else shape[rank], match[2] == "bias")
    return found


def add_adapters(decoder: Decoder, specs: Mapping[str, AdapterSpec], scale: float = 1.0) -> None:
    """Add the adapters' (empty) parameters to a network's linears; LoRA's product is multiplied by `scale`.

    The experts of a layer share stacks, so if one expert has an adapter, all of them get it. ConfigError for a linear
    that does not exist.
    """
    stacks: dict[tuple[str, str], AdapterSpec] = {}
    for name, spec in specs.items():
        match = _EXPERT.fullmatch(name)
        if match:
            stacks[match[1], match[2]] = stacks.get((match[1], match[2]), AdapterSpec()) | spec
            continue
        module = _submodule(decoder, name)
        if not isinstance(module, Linear):
            raise ConfigError(f"{name}: there is no linear of this name that anything could stand beside")
        if spec.bias:
            module.add_bias()
        if spec.rank:
            module.add_lora(spec.rank, scale)
    for (stack, kind), spec in stacks.items():
        experts = _submodule(decoder, stack)
        if not isinstance(experts, StackedExperts):
            raise ConfigError(f"{stack}: there are no experts of this name")
        if spec.bias:
            experts.add_bias(kind)
        if spec.rank:
            experts.add_lora(kind, spec.rank, scale)


def _submodule(decoder: Decoder, name: str) -> object:
    try:
        return decoder.get_submodule(name)
    except AttributeError:
        return None


def initial_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The initial value, in fp32, of a canonical tensor of an adapter or of the projections to image tokens.

    Adapters: LoRA's A is uniform, as in peft; B and biases are zero. Projections: the linear's weight is drawn like A,
    its bias is zero; the LayerNorm has weight one and bias zero; start and end are normal. Each tensor has its own
    random numbers. They depend only on `seed` and its name, so every rank draws the same ones.
    """
    if name.endswith("_proj.1.weight"):
        return torch.ones(shape)
    drawn = name.endswith(("lora_a.weight", "_proj.0.weight", "_img"))
    if not drawn:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    if name.endswith("_img"):
        return torch.empty(shape).normal_(generator=generator)  # as large as image tokens after their LayerNorm
    bound = 1 / math.sqrt(shape[-1])  # Kaiming's uniform with a = √5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def trainable_rule(args: ModelArgs, peft: bool, train_router: bool = False) -> Callable[[str], bool]:
    """Return a test of parameter names: True for those to train, all of them or with `peft` what `args` asks for.

    Full finetuning trains the router; with `peft`, it is trained only with `train_router` or a LoRA adapter of its own.
    The projections to image tokens are trained too. In stage 1 (`trainable_mode` mm_stage1) only they are.
    """
    if args.trainable_mode == "mm_stage1":
        return lambda name: PROJECTION.fullmatch(name) is not None
    if not peft:
        return lambda name: True
    kinds = [
        *(["lora"] if args.lora_rank > 0 else []),
        *(["bias"] if args.bias_tuning else []),
        *(["norm"] if args.norm_tuning else []),
        *(["router"] if train_router else []),
    ]
    patterns = [PROJECTION, *(_TRAINED[kind] for kind in kinds)]
    return lambda name: any(pattern.fullmatch(name) for pattern in patterns)
