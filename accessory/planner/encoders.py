"""How many parameters image encoders have, and how many bytes they take while they encode.

The networks are those of `nn.vision_encoders`, counted tensor by tensor. A key that a configuration leaves out has the
default of transformers. Encoders compute in 16 bits, without gradients.

Legend: h width of a transformer or of a stage, i inner width of its MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from accessory.vision_config import VIEWS_AT_ONCE, EncoderArgs, Kind, VisionArgs

# EfficientNet-Lite0 comes in one size: its parameters, the statistics of its norms among them.
_LITE_PARAMETERS = 3_413_024
# Bytes that it holds for each pixel of a view where its tensors are widest.
_LITE_BYTES_A_PIXEL = 117


def parameter_count(encoder: EncoderArgs) -> int:
    """Parameters of an encoder. ConfigError names a key that its configuration must have and has not."""
    return _PARAMETERS[encoder.kind](encoder)


def encoders_bytes(vision: VisionArgs) -> int:
    """The weights of all encoders, 16 bits. Every rank holds all of them."""
    return 2 * sum(parameter_count(encoder) for encoder in vision.all)


def features_bytes(vision: VisionArgs, views: int) -> int:
    """The features that the encoders make of so many views, 16 bits."""
    query = 0 if vision.query is None else vision.query.tokens * vision.query.channels
    return 2 * views * (vision.encoders[0].tokens * vision.channels + query)


def encoding_bytes(vision: VisionArgs, images: int, views: int, ranks: int = 1) -> int:
    """The largest moment while `ranks` ranks encode `images` images of `views` views each.

    Counted are the pixels of the views that are encoded together, the widest tensors of the widest encoder, and the
    features of all views.
    """
    together = min(VIEWS_AT_ONCE, -(-images * views // ranks))
    sizes = {encoder.size for encoder in vision.all}
    pixels = 3 * together * sum(6 * size**2 for size in sizes)  # fp32, and 16 bits as each encoder wants them
    if views > 1:  # the images at twice the size, fp32, from which four of the views are cut
        pixels += 3 * 4 * (2 * max(sizes)) ** 2 * -(-together // views)
    return pixels + together * max(map(_widest, vision.all)) + features_bytes(vision, images * views)


# --------------------------------------------------------------------------- each kind


def _widest(encoder: EncoderArgs) -> int:
    """Bytes of one view in the middle of an MLP, where an encoder's tensors are widest.

    There are the MLP's input, the normed input, and the inner tensor before and after the activation. A fused kernel
    never holds all scores of attention.
    """
    if encoder.kind == "efficientnet_lite0":
        return _LITE_BYTES_A_PIXEL * encoder.size**2
    if encoder.kind == "convnext":  # its MLPs are four times as wide inside: h + h + 4 h + 4 h
        widths = encoder.value("hidden_sizes")
        return max(2 * 10 * h * (encoder.size // (4 << n)) ** 2 for n, h in enumerate(widths))
    values = _values(encoder, "vision" if encoder.kind == "blip2" else None)
    tokens = (encoder.size // int(values["patch_size"])) ** 2 + 1
    inner = _swiglu(values) if values.get("use_swiglu_ffn") else _inner(values)
    return 2 * tokens * (2 * int(values["hidden_size"]) + 2 * inner)


def _clip(encoder: EncoderArgs) -> int:
    values, h = _values(encoder), encoder.channels
    i = _inner(values)
    embeddings = h + 3 * h * int(values["patch_size"]) ** 2 + encoder.tokens * h
    return embeddings + 2 * _norm(h) + values["num_hidden_layers"] * (_attention(h) + _mlp(h, i) + 2 * _norm(h))


def _dinov2(encoder: EncoderArgs) -> int:
    values, h = _values(encoder), encoder.channels
    patch = int(values["patch_size"])
    positions = (int(values.get("image_size", encoder.size)) // patch) ** 2 + 1
    embeddings = h + positions * h + _linear(3 * patch**2, h)
    if values["use_swiglu_ffn"]:
        inner = _swiglu(values)
        mlp = _linear(h, 2 * inner) + _linear(inner, h)
    else:
        mlp = _mlp(h, _inner(values))
    scales = 2 * h
    return embeddings + _norm(h) + values["num_hidden_layers"] * (_attention(h) + mlp + scales + 2 * _norm(h))


def _convnext(encoder: EncoderArgs) -> int:
    values = _values(encoder)
    widths, before = encoder.value("hidden_sizes"), 3
    count = _norm(widths[-1])
    for n, (depth, h) in enumerate(zip(values["depths"], widths, strict=True)):
        # A stage begins with a strided convolution. The first one is normed after it, the others before.
        stride = 4 if n == 0 else 2
        count += _linear(stride**2 * before, h) + _norm(h if n == 0 else before)
        count += depth * (_linear(49, h) + _norm(h) + _mlp(h, 4 * h) + h)
        before = h
    return int(count)


def _blip2(encoder: EncoderArgs) -> int:
    vision, qformer = _values(encoder, "vision"), _values(encoder, "qformer")
    h, i, patch = int(vision["hidden_size"]), _inner(vision), int(vision["patch_size"])
    tokens = (encoder.size // patch) ** 2 + 1
    image = h + tokens * h + _linear(3 * patch**2, h) + _norm(h)
    image += vision["num_hidden_layers"] * (_attention(h) + _mlp(h, i) + 2 * _norm(h))
    q, image_width, layers = encoder.channels, int(qformer["encoder_hidden_size"]), int(qformer["num_hidden_layers"])
    crossing = -(-layers // int(qformer["cross_attention_frequency"]))  # layers with attention over the image
    query = encoder.tokens * q + _norm(q)
    query += layers * (_attention(q) + _mlp(q, _inner(qformer)) + 2 * _norm(q))
    query += crossing * (2 * _linear(q, q) + 2 * _linear(image_width, q) + _norm(q))
    return image + query


_PARAMETERS: dict[Kind, Callable[[EncoderArgs], int]] = {
    "clip": _clip,
    "convnext": _convnext,
    "dinov2": _dinov2,
    "blip2": _blip2,
    "efficientnet_lite0": lambda _: _LITE_PARAMETERS,
}

_DEFAULTS: dict[tuple[Kind, str | None], dict[str, Any]] = {
    ("clip", None): {"intermediate_size": 3072, "num_hidden_layers": 12},
    ("dinov2", None): {"mlp_ratio": 4, "num_hidden_layers": 12, "use_swiglu_ffn": False},
    ("convnext", None): {"depths": [3, 3, 9, 3]},
    ("blip2", "vision"): {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "patch_size": 14},
    ("blip2", "qformer"): {
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "encoder_hidden_size": 1408,
        "cross_attention_frequency": 2,
    },
}


def _values(encoder: EncoderArgs, part: str | None = None) -> Mapping[str, Any]:
    given = encoder.config if part is None else encoder.config.get(part, {})
    return {**_DEFAULTS[encoder.kind, part], **given}


def _inner(values: Mapping[str, Any]) -> int:
    return int(
        values["intermediate_size"] if "intermediate_size" in values else values["hidden_size"] * values["mlp_ratio"]
    )


def _swiglu(values: Mapping[str, Any]) -> int:
    """The inner width of DINOv2's gated MLP: two thirds of a plain one's, rounded up to a multiple of 8."""
    return (int(_inner(values) * 2 / 3) + 7) // 8 * 8


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _norm(width: int) -> int:
    return 2 * width


def _attention(h: int) -> int:
    return 4 * _linear(h, h)


def _mlp(h: int, i: int) -> int:
    return _linear(h, i) + _linear(i, h)
