"""Translate the names that other libraries give to tensors of image encoders into canonical names.

A canonical name is `vision.<encoder's name>.<name in transformers' class>`, as of transformers 5.23; older spellings of
transformers are read too. Checkpoints of the original name CLIP's tensors as open_clip does (`clip.visual.…`),
ConvNeXt's as timm (`openclip_convnext_xxl.…`), DINOv2's as its hub models (`dinov2_vitg14.…`) and BLIP-2's as
transformers (`qformer.…`). Weights that are published alone have the same names without the first word.

No tensor tells which activation CLIP was trained with, so `hidden_act` of the configuration decides. open_clip builds
ViT-L-14 with quick_gelu only for OpenAI's weights; for other weights, or none, it uses gelu.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from accessory.checkpoint.lazy import Constant, Lazy, concat
from accessory.errors import CheckpointError, listed
from accessory.nn.vision import VisionTower
from accessory.vision_config import EncoderArgs, Kind, VisionArgs

_OURS = "vision."
_ORIGINAL: dict[Kind, str] = {
    "clip": "clip.",
    "convnext": "openclip_convnext_xxl.",
    "dinov2": "dinov2_vitg14.",
    "blip2": "qformer.",
}


class Rule(NamedTuple):
    """A pattern of a full name, and our names for it: one tensor, equal parts along dimension 0, or nothing."""

    theirs: re.Pattern[str]
    ours: tuple[str, ...]


def _rules(*pairs: tuple[str, str | tuple[str, ...]]) -> tuple[Rule, ...]:
    return tuple(Rule(re.compile(theirs), (ours,) if isinstance(ours, str) else ours) for theirs, ours in pairs)


# Prefixes of a network's names if it is a part of a larger one.
_WITHIN: dict[Kind, re.Pattern[str]] = {
    "clip": re.compile(r"vision_model\."),
    "convnext": re.compile(r"(visual\.)?trunk\.|convnext\."),
    "dinov2": re.compile(r"dinov2\."),
}
_TEXT = (
    r"logit_scale|logit_bias|attn_mask|positional_embedding|text_projection(\..+)?"
    r"|(token_embedding|transformer|ln_final|text|text_model)\..+"
)
_BLOCK = r"visual\.transformer\.resblocks\.(\d+)\."
_STAGE = r"stages\.(\d+)\."
_OLD = r"encoder\.layer\.(\d+)\."
_QKV = tuple(rf"encoder.layer.\1.attention.{n}_proj.\2" for n in "qkv")
_GATED = (r"encoder.layer.\1.mlp.gate_proj.\2", r"encoder.layer.\1.mlp.up_proj.\2")
_RULES: dict[Kind, tuple[Rule, ...]] = {
    "clip": _rules(
        (r"visual\.conv1\.weight", "embeddings.patch_embedding.weight"),
        (r"visual\.class_embedding", "embeddings.class_embedding"),
        (r"visual\.positional_embedding", "embeddings.position_embedding.weight"),
        (r"visual\.ln_pre\.(.+)", r"pre_layrnorm.\1"),
        (r"visual\.ln_post\.(.+)", r"post_layernorm.\1"),
        (_BLOCK + r"ln_([12])\.(.+)", r"encoder.layers.\1.layer_norm\2.\3"),
        (_BLOCK + r"attn\.in_proj_(.+)", tuple(rf"encoder.layers.\1.self_attn.{n}_proj.\2" for n in "qkv")),
        (_BLOCK + r"attn\.out_proj\.(.+)", r"encoder.layers.\1.self_attn.out_proj.\2"),
        (_BLOCK + r"mlp\.c_fc\.(.+)", r"encoder.layers.\1.mlp.fc1.\2"),
        (_BLOCK + r"mlp\.c_proj\.(.+)", r"encoder.layers.\1.mlp.fc2.\2"),
        (_TEXT + r"|visual\.proj|visual_projection\..+|embeddings\.position_ids", ()),
    ),
    "convnext": _rules(
        (r"stem\.0\.(.+)", r"embeddings.patch_embeddings.\1"),
        (r"stem\.1\.(.+)", r"embeddings.layernorm.\1"),
        (_STAGE + r"downsample\.(.+)", r"encoder.stages.\1.downsampling_layer.\2"),
        (_STAGE + r"blocks\.(\d+)\.conv_dw\.(.+)", r"encoder.stages.\1.layers.\2.dwconv.\3"),
        (_STAGE + r"blocks\.(\d+)\.norm\.(.+)", r"encoder.stages.\1.layers.\2.layernorm.\3"),
        (_STAGE + r"blocks\.(\d+)\.mlp\.fc([12])\.(.+)", r"encoder.stages.\1.layers.\2.pwconv\3.\4"),
        (_STAGE + r"blocks\.(\d+)\.gamma", r"encoder.stages.\1.layers.\2.layer_scale_parameter"),
        (r"head\.norm\.(.+)", r"layernorm.\1"),
        (_TEXT + r"|(visual\.)?head\..+|classifier\..+", ()),
    ),
    "dinov2": _rules(
        (r"cls_token", "embeddings.cls_token"),
        (r"pos_embed", "embeddings.position_embeddings"),
        (r"patch_embed\.proj\.(.+)", r"embeddings.patch_embeddings.projection.\1"),
        (r"norm\.(.+)", r"layernorm.\1"),
        (r"blocks\.(\d+)\.(norm[12]\..+|mlp\.fc[12]\..+)", r"encoder.layer.\1.\2"),
        (r"blocks\.(\d+)\.attn\.qkv\.(.+)", _QKV),
        (r"blocks\.(\d+)\.attn\.proj\.(.+)", r"encoder.layer.\1.attention.o_proj.\2"),
        (r"blocks\.(\d+)\.ls([12])\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1"),
        (r"blocks\.(\d+)\.mlp\.w12\.(.+)", _GATED),
        (r"blocks\.(\d+)\.mlp\.w3\.(.+)", r"encoder.layer.\1.mlp.down_proj.\2"),
        (_OLD + r"attention\.attention\.query\.(.+)", _QKV[0]),
        (_OLD + r"attention\.attention\.key\.(.+)", _QKV[1]),
        (_OLD + r"attention\.attention\.value\.(.+)", _QKV[2]),
        (_OLD + r"attention\.output\.dense\.(.+)", r"encoder.layer.\1.attention.o_proj.\2"),
        (_OLD + r"mlp\.weights_in\.(.+)", _GATED),
        (_OLD + r"mlp\.weights_out\.(.+)", r"encoder.layer.\1.mlp.down_proj.\2"),
        (r"(embeddings\.)?mask_token|(head|classifier)\..+", ()),
    ),
    "blip2": _rules(
        (r"qformer\.(embeddings|cls)\..+|qformer\.encoder\.layer\.\d+\.(intermediate|output)\..+", ()),
        (r"(language_model|language_projection|vision_projection|text_projection|itm_head|embeddings)\..+", ()),
    ),
    "efficientnet_lite0": _rules((r"_fc\..+|.*\.num_batches_tracked", ())),
}


def parts_of(kind: Kind, name: str) -> tuple[str, ...]:
    """The canonical names, within their encoder, of the equal parts of tensor `name` along dimension 0.

    It returns () if the tensor is not needed. A name without a rule is taken to be canonical.
    """
    within = _WITHIN.get(kind)
    name = within.sub("", name, count=1) if within is not None and within.match(name) else name
    for rule in _RULES[kind]:
        if match := rule.theirs.fullmatch(name):
            return tuple(match.expand(ours) for ours in rule.ours)
    return (name,)


def destinations(tower: VisionTower) -> dict[str, Tensor]:
    """Map canonical names to a tower's tensors, or to views of their parts, in any version of transformers."""
    out: dict[str, Tensor] = {}
    state = tower.state_dict()
    for encoder in tower.args.all:
        for name, tensor in state.items():
            within = name.removeprefix(f"encoders.{encoder.name}.")
            if within == name:
                continue
            parts = parts_of(encoder.kind, within)
            for part, tensor_part in zip(
                parts, tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,) * len(parts), strict=True
            ):
                out[f"{_OURS}{encoder.name}.{part}"] = tensor_part
    return out


def expected_shapes(args: VisionArgs) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the encoders, by canonical name."""
    with torch.device("meta"):
        tower = VisionTower(args, 1)
    return {name: tuple(tensor.shape) for name, tensor in destinations(tower).items()}


def canonical(
    raw: Mapping[str, Lazy], args: VisionArgs, expected: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Lazy]:
    """Pick the encoders' tensors out of a checkpoint's, under canonical names. They are cut lazily; nothing is read.

    Names in `raw` have no `llma.` in front. Encoders that `raw` lacks entirely are left out, and so are parts that we
    do not use (CLIP's text tower, a language model). `expected` are the shapes by the configuration, if the caller has
    them already. Raises CheckpointError listing an encoder's tensors that are missing, misshapen or unknown.
    """
    expected = expected_shapes(args) if expected is None else expected
    out: dict[str, Lazy] = {}
    for encoder in args.all:
        within = dict(_within(encoder, raw, args))
        if within:
            out.update(canonical_of(encoder, within, expected))
    return out


def canonical_of(
    encoder: EncoderArgs, within: Mapping[str, Lazy], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, Lazy]:
    """Do as `canonical` for one encoder, whose tensors are named as in weights that were published alone."""
    if encoder.kind == "blip2":
        within = _fused_biases(within)
    prefix = f"{_OURS}{encoder.name}."
    out: dict[str, Lazy] = {}
    twice, uneven = [], []
    for name, tensor in within.items():
        parts = parts_of(encoder.kind, name)
        if len(parts) > 1 and (not tensor.shape or tensor.shape[0] % len(parts)):
            uneven.append(f"{name} {tensor.shape}")
            continue
        for i, part in enumerate(parts):
            if prefix + part in out:
                twice.append(part)
            rows = tensor.shape[0] // len(parts) if len(parts) > 1 else 0
            out[prefix + part] = tensor.narrow(0, i * rows, rows) if len(parts) > 1 else tensor
    wanted = {name: shape for name, shape in expected.items() if name.startswith(prefix)}
    misshapen = [
        f"{name.removeprefix(prefix)} {tensor.shape} instead of {wanted[name]}"
        for name, tensor in out.items()
        if name in wanted and tensor.shape != wanted[name]
    ]
    problems = [
        f"{len(names)} tensors {problem}: {listed(names)}"
        for problem, names in (
            ("missing", [n.removeprefix(prefix) for n in wanted if n not in out]),
            ("unknown", [n.removeprefix(prefix) for n in out if n not in wanted]),
            ("there twice, under different names", twice),
            ("that cannot be cut into equal parts", uneven),
            ("of another shape than its configuration says", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"vision: encoder {encoder.name} ({encoder.kind}): " + "; ".join(problems))
    return out


def _within(encoder: EncoderArgs, raw: Mapping[str, Lazy], args: VisionArgs) -> Iterator[tuple[str, Lazy]]:
    """Yield this encoder's tensors: under our prefix, and under the original's if it is the first of its kind."""
    prefixes = [f"{_OURS}{encoder.name}."]
    if encoder.kind in _ORIGINAL and next(e for e in args.all if e.kind == encoder.kind) is encoder:
        prefixes.append(_ORIGINAL[encoder.kind])
    for name, tensor in raw.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                yield name.removeprefix(prefix), tensor


def _fused_biases(within: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Join the biases of queries, keys and values into one, as transformers has it.

    BLIP-2's image encoder was first published with biases for queries and values only; those of keys are zeros.
    """
    out = dict(within)
    for name in within:
        stem = name.removesuffix("q_bias")
        if stem != name and stem + "v_bias" in within:
            q, v = out.pop(name), out.pop(stem + "v_bias")
            k = Constant(torch.zeros(q.shape, dtype=q.dtype))
            out[stem + "qkv.bias"] = concat([q, k, v], 0)
    return out
