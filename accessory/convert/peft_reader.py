"""Read an adapter folder of Hugging Face's PEFT: canonical adapter tensors, and their configuration.

Experts have two spellings. Classic: a pair of matrices for each expert's linear ("…experts.3.w1.lora_A.weight").
Fused: PEFT's pairs for the stacked experts of transformers 5, where w1 and w3 are one matrix.

Legend: D dim, F hidden dim, E experts, R rank of a fused pair.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.files import read_file
from accessory.checkpoint.lazy import Constant, Lazy
from accessory.checkpoint.names import expected_shapes, from_hf, shape_problem
from accessory.checkpoint.rotary import rotary_from_hf
from accessory.checkpoint.weight_files import PEFT_CONFIG
from accessory.config import LORA_TARGETS, LORA_TARGETS_ON_REQUEST, ModelArgs
from accessory.convert.peft_settings import PeftSettings, read_settings
from accessory.errors import CheckpointError

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
# Weights that PEFT may save whole (modules_to_save), and PEFT's names for their modules.
WHOLE = {
    "attention_norm.weight": "input_layernorm",
    "ffn_norm.weight": "post_attention_layernorm",
    "norm.weight": "model.norm",
    "gate.weight": "gate",
    "output.weight": "lm_head",
    "tok_embeddings.weight": "embed_tokens",
}
_LORA = re.compile(r"(.+?)\.lora_([AB])(?:\.[^.]+)?\.weight")
_FUSED = re.compile(r"(model\.layers\.\d+\.)mlp\.experts((?:\.base_layer)*)")
_SAVED = re.compile(r"(.+?)(?:\.modules_to_save(?:\.[^.]+)?|\.base_layer)?\.weight")


@dataclass(frozen=True)
class LoraPair:
    """A LoRA pair in memory: a (r, in), b (out, r), and the factor of their product."""

    a: Tensor
    b: Tensor
    scale: float


def read_adapter(folder: Path, args: ModelArgs) -> tuple[dict[str, Lazy], ModelArgs]:
    """Read PEFT's folder for a network of `args`: canonical tensors, and `args` with the adapter's fields.

    Our network has one rank and one scale. Pairs of a smaller rank are padded with zeros. If scales differ (a pattern,
    or rank-stabilised LoRA of several ranks), the ratio of a pair's scale to the common one is multiplied into its b.
    Raises CheckpointError for anything but plain LoRA, and for tensors that the network cannot have.
    """
    if not (folder / PEFT_CONFIG).is_file():
        raise CheckpointError(f"{folder}: no adapter of PEFT: {PEFT_CONFIG} is not in it")
    config = read_settings(folder / PEFT_CONFIG)
    files = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not files:
        raise CheckpointError(f"{folder}: {' or '.join(WEIGHTS)} is missing")
    halves: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Lazy] = {}
    for key, tensor in read_file(files[0]).items():
        match = _LORA.fullmatch(key)
        if match:
            halves.setdefault(match[1].removeprefix(PREFIX), {})[match[2]] = tensor.load()
        else:
            saved[_saved_name(key, files[0])] = tensor
    pairs: dict[str, LoraPair] = {}
    expected = expected_shapes(args)
    for module, half in halves.items():
        if half.keys() != {"A", "B"}:
            lacking = "lora_A" if "B" in half else "lora_B"
            raise CheckpointError(f"{files[0]}: {PREFIX}{module}.{lacking}.weight: missing; the adapter is incomplete")
        fused = _FUSED.fullmatch(module)
        if fused:
            pairs |= _read_stack(fused[1], module, half["A"], half["B"], config, args, files[0])
        else:
            weight, pair = _read_pair(module, half["A"], half["B"], config, expected, files[0])
            pairs[weight] = pair
    tensors, args = _uniform(pairs, args)
    tensors |= saved
    problems = [p for p in (shape_problem(name, tensor, expected) for name, tensor in tensors.items()) if p]
    if problems:
        raise CheckpointError(f"{files[0]}: {problems[0]}; is it an adapter of another model?")
    tensors = {name: rotary_from_hf(name, tensor, args) for name, tensor in tensors.items()}
    return tensors, args.replace(bias_tuning=False, norm_tuning=any(name.endswith("norm.weight") for name in saved))


def target_of(weight: str) -> str | None:
    """The LoRA target of a linear's weight: "wq" … "w3", "gate" or "output"; None for other names."""
    kind = weight.removesuffix(".weight").rpartition(".")[2]
    return kind if kind in (*LORA_TARGETS, *LORA_TARGETS_ON_REQUEST) else None


def kind_of(name: str) -> str:
    """A tensor's name without layer and block: "ffn_norm.weight"."""
    return ".".join(name.split(".")[-2:])


def _saved_name(key: str, path: Path) -> str:
    """The canonical name of a weight that PEFT saved whole; CheckpointError if our network has no place for it."""
    match = _SAVED.fullmatch(key)
    name = None if match is None else from_hf(match[1].removeprefix(PREFIX) + ".weight")
    if name is None or kind_of(name) not in WHOLE:
        hint = (
            "DoRA's magnitudes are not read"
            if "lora_magnitude" in key
            else "only LoRA, norms, router, embeddings, head"
        )
        raise CheckpointError(f"{path}: {key}: has no place in our network; {hint}")
    return name


def _read_pair(
    module: str, a: Tensor, b: Tensor, config: PeftSettings, expected: Collection[str], path: Path
) -> tuple[str, LoraPair]:
    """One of PEFT's pairs beside a linear, and the canonical name of the linear's weight, which must be `expected`."""
    weight = from_hf(module + ".weight") or from_hf(module.replace(".mlp.", ".block_sparse_moe.") + ".weight")
    if weight is None or target_of(weight) is None or a.dim() != 2 or b.dim() != 2:
        raise CheckpointError(
            f"{path}: {PREFIX}{module}.lora_A.weight {tuple(a.shape)}: stands beside no linear of ours"
        )
    if a.shape[0] != b.shape[1]:
        shapes = f"lora_A.weight {tuple(a.shape)}, lora_B.weight {tuple(b.shape)}"
        raise CheckpointError(f"{path}: {PREFIX}{module}.{shapes}: are of different rank")
    if weight not in expected:
        raise CheckpointError(f"{path}: LoRA beside {weight}, which the base model does not have")
    config.check_target(module)
    config.check_rank(module, a.shape[0])
    return weight, LoraPair(a, b, config.scale(module, a.shape[0]))


def _read_stack(
    layer: str, module: str, a: Tensor, b: Tensor, config: PeftSettings, args: ModelArgs, path: Path
) -> dict[str, LoraPair]:
    """Canonical weight → pair, from a fused pair: a (E·R, in) is expert-major, b (out, R·E) expert-minor.

    Shapes tell which stack it adapts.
    """
    D, F, E = args.dim, args.hidden_dim, args.moe.num_experts
    sides = {(D, 2 * F): "gate_up_proj", (F, D): "down_proj"}
    which = sides.get((a.shape[1], b.shape[0])) if a.dim() == b.dim() == 2 else None
    if which is None or a.shape[0] != b.shape[1] or a.shape[0] % E or not a.numel():
        raise CheckpointError(
            f"{path}: {PREFIX}{module}.lora_A.weight {tuple(a.shape)}, lora_B.weight {tuple(b.shape)}: beside neither "
            f"gate_up_proj nor down_proj of {E} experts"
        )
    a_ERI, b_EOR = a.view(E, -1, a.shape[1]), b.view(b.shape[0], -1, E).permute(2, 0, 1)
    R = a_ERI.shape[1]
    stack = f"{layer}mlp.experts.{which}"
    config.check_rank(stack, R)
    scale = config.scale(stack, R)
    cut = {"w2": (slice(None), slice(None))}
    if which == "gate_up_proj":
        # If two pairs were fused, b is block-diagonal, and w1 and w3 each get a half of a. Otherwise both get all of a.
        half = R // 2
        apart = R % 2 == 0 and not b_EOR[:, :F, half:].any() and not b_EOR[:, F:, :half].any()
        ranks = (slice(half), slice(half, None)) if apart else (slice(None), slice(None))
        cut = {"w1": (slice(F), ranks[0]), "w3": (slice(F, None), ranks[1])}
    return {
        f"{layer.removeprefix('model.')}feed_forward.experts.{e}.{kind}.weight": LoraPair(
            a_ERI[e, ranks], b_EOR[e, rows, ranks], scale
        )
        for kind, (rows, ranks) in cut.items()
        for e in range(E)
    }


def _uniform(pairs: Mapping[str, LoraPair], args: ModelArgs) -> tuple[dict[str, Lazy], ModelArgs]:
    """Give all pairs one rank and one scale; complete stacks with zeros, and drop stacks that are all zeros."""
    stacks = Counter(_stack_of(w) for w, pair in pairs.items() if pair.a.any() or pair.b.any())
    pairs = {weight: pair for weight, pair in pairs.items() if stacks[_stack_of(weight)]}
    if not pairs:
        return {}, args.replace(lora_rank=-1, lora_alpha=None, lora_targets=LORA_TARGETS)
    rank = max(pair.a.shape[0] for pair in pairs.values())
    scale = Counter(pair.scale for pair in pairs.values()).most_common(1)[0][0]
    tensors: dict[str, Lazy] = {}
    for weight, shape in expected_shapes(args).items():
        if not stacks[_stack_of(weight)]:
            continue
        given = pairs.get(weight)
        a, b = torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank)
        if given is not None:
            own = given.b if given.scale == scale else given.b.float() * (given.scale / scale)
            a, b = _padded(given.a, 0, rank), _padded(own, 1, rank)
        linear = weight.removesuffix("weight")
        tensors[linear + "lora_a.weight"], tensors[linear + "lora_b.weight"] = Constant(a), Constant(b)
    known = (*LORA_TARGETS, *LORA_TARGETS_ON_REQUEST)
    targets = tuple(t for t in known if any(target_of(weight) == t for weight in pairs))
    alpha = None if scale == 1 else scale * rank
    return tensors, args.replace(lora_rank=rank, lora_alpha=alpha, lora_targets=targets)


def _padded(matrix: Tensor, dim: int, size: int) -> Tensor:
    more = size - matrix.shape[dim]
    if more == 0:
        return matrix.contiguous()
    zeros = matrix.new_zeros((more, matrix.shape[1]) if dim == 0 else (matrix.shape[0], more))
    return torch.cat([matrix, zeros], dim)


def _stack_of(weight: str) -> str:
    return re.sub(r"\.experts\.\d+\.", ".experts.", weight)
