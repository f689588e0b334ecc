"""`accessory merge`: merge adapters into the weights, and certify that nothing else changed.

W + scale · B·A is computed in fp32 and rounded once. Three surprises are errors, raised before anything is written: an
adapter that changes nothing, an update that rounding removes, and a merged network that computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from accessory.checkpoint.atomic import check_destination, refuse_overlap
from accessory.checkpoint.chain import chained_args, open_chain
from accessory.checkpoint.folder import Checkpoint
from accessory.checkpoint.hashing import each_tensor
from accessory.checkpoint.lazy import Computed, Lazy
from accessory.checkpoint.names import companion_of, is_of_images
from accessory.checkpoint.save import parse_dtype, write_checkpoint
from accessory.checkpoint.writers import Target
from accessory.config import LORA_TARGETS, Implementation, ModelArgs
from accessory.convert.certify import Certificate, certify
from accessory.convert.sums import check_sums
from accessory.errors import CheckpointError, listed
from accessory.parallel.sharding import expert_of

PathLike = str | Path
State = Literal["changed", "zero", "swallowed"]
_PLAIN = {"lora_rank": -1, "lora_alpha": None, "lora_targets": LORA_TARGETS, "norm_tuning": True}


@dataclass(frozen=True)
class Pair:
    """The LoRA adapter of one weight: a (r, in), b (out, r); the weight becomes W + scale · b·a."""

    a: Lazy
    b: Lazy
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Effect:
    """What merging does to one weight. zero: B·A is exactly zero; swallowed: rounding removes the whole update."""

    name: str
    state: State
    size: float  # of the update relative to the weight, by Frobenius norm


@dataclass(frozen=True)
class Change:
    """A weight with a LoRA adapter, before and after merging, both lazy; `effect` reads and compares them."""

    name: str
    before: Lazy
    pair: Pair
    dtype: torch.dtype  # of the merged weight

    def merged(self) -> Tensor:
        """W + scale · B·A in fp32, not rounded yet."""
        weight = self.before.load().to(torch.float32, copy=True)  # a copy: the loaded tensor may be a file
        return weight.addmm_(self.pair.b.load().float(), self.pair.a.load().float(), alpha=self.pair.scale)

    def after(self) -> Lazy:
        return Computed(self.before.shape, self.dtype, self.merged)

    def effect(self) -> Effect:
        """Compare the weight before and after merging. CheckpointError if the merged weight is not finite."""
        size = self._size()
        if size == 0:
            return Effect(self.name, "zero", 0.0)
        after, before = self.merged().to(self.dtype), self.before.load().to(self.dtype)
        if not torch.isfinite(after).all():
            kind = str(self.dtype).removeprefix("torch.")
            raise CheckpointError(f"{self.name}: merged, it holds infinite numbers or NaN in {kind}")
        return Effect(self.name, "changed" if bool((after != before).any()) else "swallowed", size)

    def _size(self) -> float:
        a, b = self.pair.a.load().double(), self.pair.b.load().double()
        squared = float((b.T @ b * (a @ a.T)).sum()) * self.pair.scale**2  # trace of (BᵀB)(AAᵀ): no large product
        if squared <= 0 and not (self.pair.b.load().float() @ self.pair.a.load().float()).any():
            return 0.0
        weight = float(torch.linalg.vector_norm(self.before.load(), dtype=torch.float32))
        return max(squared, torch.finfo(torch.float64).tiny) ** 0.5 / max(weight, torch.finfo(torch.float32).tiny)


@dataclass
class Report:
    """What was merged; `lines` describes it for the user."""

    effects: list[Effect] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)  # whole tensors (norms, router) that differ from the base's
    biases: int = 0
    certificate: Certificate | None = None

    @property
    def unchanged(self) -> list[Effect]:
        return [e for e in self.effects if e.state != "changed"]

    def to_dict(self) -> dict[str, Any]:
        """What was merged, weight by weight, as plain values for JSON."""
        return {
            "weights": [asdict(effect) for effect in self.effects],
            "unchanged_experts": self.idle_experts(),
            "replaced": self.replaced,
            "biases": self.biases,
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
        }

    def idle_experts(self) -> dict[str, list[int]]:
        """Layer ("layers.3") → experts that have LoRA adapters, none of which changed a weight."""
        moved: dict[str, dict[int, bool]] = {}
        for effect in self.effects:
            expert = expert_of(effect.name)
            if expert is not None:
                layer = moved.setdefault(_layer_of(effect.name), {})
                layer[expert] = layer.get(expert, False) or effect.state == "changed"
        idle = {layer: [e for e, changed in experts.items() if not changed] for layer, experts in moved.items()}
        return {layer: experts for layer, experts in idle.items() if experts}

    def lines(self) -> list[str]:
        idle, out = self.idle_experts(), []
        for layer in dict.fromkeys(_layer_of(e.name) for e in self.effects):
            here = [e for e in self.effects if _layer_of(e.name) == layer]
            changed = [e for e in here if e.state == "changed"]
            largest = max((e.size for e in here), default=0.0)
            text = f"{layer}: {len(changed)} of {len(here)} weights changed, the most by {largest:.2%} of its size"
            if layer in idle:
                text += f"; unchanged experts: {', '.join(map(str, idle[layer]))}"
            out.append(text)
        if self.replaced:
            out.append(
                f"{len(self.replaced)} tensors were trained whole and replace the base's: {listed(self.replaced)}"
            )
        if self.biases:
            out.append(
                f"{self.biases} biases have no place in a plain weight and stay beside it: the result has bias_tuning "
                "and is of llama_type mixtral_peft or mixtral_sparse_peft"
            )
        if self.certificate is not None:
            out += [*self.certificate.lines(), "  every number that is written is W + scale·B·A, rounded once"]
        return out


def _layer_of(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]


def pairs_of(tensors: Mapping[str, Lazy], args: ModelArgs) -> dict[str, Pair]:
    """Weight → its LoRA adapter. CheckpointError if half of a pair is missing or ranks contradict each other."""
    pairs = {}
    for name in tensors:
        companion = companion_of(name)
        if companion is None or companion[1] == "bias":
            continue
        weight = companion[0]
        linear = weight.removesuffix("weight")
        a, b = tensors.get(linear + "lora_a.weight"), tensors.get(linear + "lora_b.weight")
        if a is None or b is None:
            lacking = "lora_a" if a is None else "lora_b"
            raise CheckpointError(
                f"{linear}{lacking}.weight: missing, though {name} is there; the adapter is incomplete"
            )
        if a.shape[0] != b.shape[1]:
            raise CheckpointError(f"{linear}lora_a.weight {a.shape} and lora_b.weight {b.shape} are of different rank")
        if args.lora_alpha is not None and a.shape[0] != args.lora_rank:
            raise CheckpointError(
                f"{linear}lora_a.weight {a.shape}: is not of lora_rank {args.lora_rank}, by which lora_alpha is divided"
            )
        pairs[weight] = Pair(a, b, args.lora_scale)
    return pairs


def merge_tensors(
    tensors: Mapping[str, Lazy], args: ModelArgs, dtype: torch.dtype | None = None
) -> tuple[dict[str, Lazy], list[Change]]:
    """Merge LoRA lazily; return the canonical tensors without LoRA, and the changes.

    A weight with LoRA becomes W + scale · B·A. Tensors keep their dtype, or all get `dtype`. Biases stay as they are.
    CheckpointError as `pairs_of`, and for LoRA whose weight is missing.
    """
    pairs = pairs_of(tensors, args)
    alone = [weight for weight in pairs if weight not in tensors]
    if alone:
        raise CheckpointError(f"{alone[0]}: missing, though LoRA stands beside it; give the base model first")
    changes = [Change(w, tensors[w], pair, dtype or tensors[w].dtype) for w, pair in pairs.items()]
    after = {change.name: change.after() for change in changes}
    out = {}
    for name, tensor in tensors.items():
        companion = companion_of(name)
        if name in after:
            out[name] = after[name]
        elif companion is None or companion[1] == "bias":
            out[name] = tensor if dtype is None else tensor.to(dtype)
    return out, changes


def merge(
    paths: Sequence[PathLike],
    dst: PathLike,
    *,
    to: Target | None = None,
    shards: int | None = None,
    dtype: str | torch.dtype | None = None,
    safetensors: bool = False,
    overwrite: bool = False,
    allow_unchanged: bool = False,
    allow_other_base: bool = False,
    certificate: bool = True,
    device: str | torch.device = "cpu",
    verify: bool = True,
    progress: bool = True,
    config_files: Sequence[PathLike] = (),
) -> Report:
    """Merge `paths` (a base model and adapters in order, or one whole folder) and write the network to `dst`.

    `to`: by default the layout of the first path. `dtype`: by default each weight keeps its own, and trained norms and
    routers keep the dtype of their training. Other options are those of `write_checkpoint`. `certificate`: before
    writing, run the merged and the unmerged network on `device`, a layer at a time, and compare their logits.

    Raises CheckpointError, with nothing written, if there is no adapter or an incomplete one, if merged and unmerged
    logits differ, or if there are biases and the layout has none. Unless `allow_unchanged`, it also raises if the
    adapter changes nothing, or if rounding removes the whole update of a weight. Unless `allow_other_base`, it raises
    if an adapter says that it was trained on another model.
    """
    target = parse_dtype(dtype)
    check_destination(dst, overwrite, paths)
    checkpoints = open_chain(paths, config_files, refuse_other_base=not allow_other_base)
    args = chained_args(checkpoints)
    for checkpoint in checkpoints:
        refuse_overlap(checkpoint.path, Path(dst))
        checkpoint.warn_of_dequantizing()
    base, where = checkpoints[0], ", ".join(str(c.path) for c in checkpoints[1:] or checkpoints)
    layout: Target = to or _written_as(base)
    tensors = _overlaid(checkpoints)
    merged, changes = merge_tensors(tensors, args, target)
    biases = [name for name in merged if companion_of(name)]
    _check_biases(biases, layout)
    if len(checkpoints) == 1 and not changes and not biases:
        raise CheckpointError(f"{where}: no adapter: nothing stands beside a weight; give PATH ADAPTER … DST")
    report = Report(biases=len(biases), replaced=_replaced(checkpoints))
    report.effects = _effects(changes, progress)
    _check_effects(report, where, allow_unchanged)
    if certificate:
        implementation, stored = checkpoints[-1].llama_type.implementation, target or base.dtype
        report.certificate = prove(
            base.tensors, tensors, merged, args, implementation, dtype=stored, device=device, progress=progress
        )
    if "start_img" in merged:
        from accessory.checkpoint.vision import with_encoders

        merged = with_encoders(merged, args)
    write_checkpoint(
        dst,
        merged,
        args.replace(**_PLAIN, bias_tuning=bool(biases)),  # the base's sizes, the adapters' image encoders
        to=layout,
        shards=base.shards if shards is None and layout == base.layout and layout != "hf" else shards,
        safetensors=safetensors,
        resources=list({path.name: path for c in checkpoints for path in c.resources}.values()),
        overwrite=overwrite,
        verify=verify,
        progress=progress,
        image_views=max(c.llama_type.image_views for c in checkpoints),
    )
    return report


def prove(
    base: Mapping[str, Lazy],
    tensors: Mapping[str, Lazy],
    merged: Mapping[str, Lazy],
    args: ModelArgs,
    implementation: Implementation,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Certificate:
    """Prove that `merged`, in `dtype`, is what `tensors` become; `base` has the tensors before any adapter.

    CheckpointError unless the logits are the same in fp32, and every number to be written is the right sum, rounded.
    """
    networks = {
        "adapters": tensors,
        "exact": merge_tensors(tensors, args, torch.float32)[0],
        "stored": merged,
        "base": {name: tensor for name, tensor in base.items() if companion_of(name) is None},
    }
    networks = {kind: {n: t for n, t in own.items() if not is_of_images(n)} for kind, own in networks.items()}
    certificate = certify(networks, args, implementation, dtype=dtype, device=device, progress=progress)
    certificate.check()
    check_sums(merged, tensors, args.lora_scale, progress=progress)
    return certificate


def _written_as(base: Checkpoint) -> Target:
    """The layout of the base, or the nearest one that can be written."""
    if base.layout == "quantized" or base.layout == "gguf":
        return base.llama_type.implementation
    return "torrent" if base.layout == "official" else base.layout


def _overlaid(checkpoints: Sequence[Checkpoint]) -> dict[str, Lazy]:
    """The tensors of all checkpoints; later ones replace earlier ones.

    They get the base's dtype, except adapters, tensors that the base lacks, and norms and routers, which run in fp32
    anyway.
    """
    base = checkpoints[0].tensors
    tensors = dict(base)
    for checkpoint in checkpoints[1:]:
        for name, tensor in checkpoint.tensors.items():
            keep = companion_of(name) is not None or name not in base or _runs_in_fp32(name)
            tensors[name] = tensor if keep else tensor.to(base[name].dtype)
    return tensors


def _runs_in_fp32(name: str) -> bool:
    return name.endswith(("norm.weight", ".gate.weight"))


def _replaced(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """The names of tensors that were trained whole and differ from the base's."""
    base = checkpoints[0].tensors
    last = {name: t for c in checkpoints[1:] for name, t in c.tensors.items() if companion_of(name) is None}
    return [n for n, t in last.items() if n not in base or not torch.equal(t.load().float(), base[n].load().float())]


def _effects(changes: Sequence[Change], progress: bool) -> list[Effect]:
    by_name = {change.name: change for change in changes}
    weights = {name: change.before for name, change in by_name.items()}
    done = each_tensor(weights, lambda name, _: by_name[name].effect(), progress=progress, title="comparing")
    return list(done.values())


def _check_biases(biases: Sequence[str], layout: Target) -> None:
    if biases and layout in ("hf", "torrent"):
        whose = "Hugging Face's Mixtral" if layout == "hf" else "the torrent layout"
        raise CheckpointError(
            f"{biases[0]}: {whose} has no biases ({len(biases)} such tensors); write base or sparse, or train without "
            "bias_tuning"
        )


def _check_effects(report: Report, where: str, allow_unchanged: bool) -> None:
    swallowed = [e.name for e in report.effects if e.state == "swallowed"]
    nothing = not report.effects and not report.replaced and not report.biases
    if allow_unchanged:
        return
    if nothing or (report.effects and all(e.state == "zero" for e in report.effects)):
        how = (
            f"B·A is exactly zero beside all {len(report.effects)} weights"
            if report.effects
            else "all is as in the base"
        )
        raise CheckpointError(
            f"{where}: changes nothing: {how}; was it trained? --allow-unchanged merges it all the same"
        )
    if swallowed:
        raise CheckpointError(
            f"{where}: rounding takes away the whole update of {len(swallowed)} weights: {listed(swallowed)}; "
            "give --dtype fp32, or --allow-unchanged to accept it"
        )
