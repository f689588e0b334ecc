"""How many bytes image encoders take, resting and at work: plain arithmetic on `VisionArgs`, without torch.

The networks are those of `nn.vision_encoders`, counted number by number; keys that a configuration leaves out have
transformers' defaults. Encoders compute in 16 bits, without gradients.

Letters: h width, i width inside an MLP, T tokens of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from accessory.vision_config import VIEWS_AT_ONCE, EncoderArgs, Kind, VisionArgs

# EfficientNet-Lite0 comes in one size: parameters, with the statistics of its norms; and bytes that it holds at its
# widest place for each pixel of a view.
_LITE_NUMBERS, _LITE_BYTES = 3_413_024, 117


def encoder_numbers(encoder: EncoderArgs) -> int:
    """Numbers that an encoder holds. ConfigError for a key that its configuration must have."""
    return _NUMBERS[encoder.kind](encoder)


def encoders_bytes(vision: VisionArgs) -> int:
    """All of them in 16 bits; every rank holds them whole."""
    return 2 * sum(encoder_numbers(encoder) for encoder in vision.all)


def features_bytes(vision: VisionArgs, views: int) -> int:
    """What the encoders saw of so many views, 16 bits."""
    query = 0 if vision.query is None else vision.query.tokens * vision.query.channels
    return 2 * views * (vision.encoders[0].tokens * vision.channels + query)


def encoding_bytes(vision: VisionArgs, images: int, views: int, ranks: int = 1) -> int:
    """The largest moment of looking at `images` images as `views` views each, work shared by `ranks`: pixels of the
    views that are looked at together, what the encoder with the widest tensors makes of them, and all features."""
    together = min(VIEWS_AT_ONCE, -(-images * views // ranks))
    sizes = {encoder.size for encoder in vision.all}
    pixels = 3 * together * sum(6 * size**2 for size in sizes)  # fp32, and 16 bits as each encoder wants them
    if views > 1:  # an image at twice the size, to be cut into quarters
        pixels += 3 * 4 * (2 * max(sizes)) ** 2 * -(-together // views)
    return pixels + together * max(map(_widest, vision.all)) + features_bytes(vision, images * views)


# --------------------------------------------------------------------------- each kind


def _widest(encoder: EncoderArgs) -> int:
    """Bytes of a view in the middle of an MLP, where an encoder's tensors are widest: its input, that normed, and the
    inner width before and behind the activation. Attention's scores are never there as a whole."""
    if encoder.kind == "efficientnet_lite0":
        return _LITE_BYTES * encoder.size**2
    if encoder.kind == "convnext":
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
    numbers = _norm(widths[-1])
    for n, (depth, h) in enumerate(zip(values["depths"], widths, strict=True)):
        step = 4 if n == 0 else 2  # pixels or positions that become one, each way; normed behind, or in front
        numbers += _linear(step**2 * before, h) + _norm(h if n == 0 else before)
        numbers += depth * (_linear(49, h) + _norm(h) + _mlp(h, 4 * h) + h)
        before = h
    return int(numbers)


def _blip2(encoder: EncoderArgs) -> int:
    sees, asks = _values(encoder, "vision"), _values(encoder, "qformer")
    h, i, patch = int(sees["hidden_size"]), _inner(sees), int(sees["patch_size"])
    tokens = (encoder.size // patch) ** 2 + 1
    image = h + tokens * h + _linear(3 * patch**2, h) + _norm(h)
    image += sees["num_hidden_layers"] * (_attention(h) + _mlp(h, i) + 2 * _norm(h))
    q, seen, layers = encoder.channels, int(asks["encoder_hidden_size"]), int(asks["num_hidden_layers"])
    looking = -(-layers // int(asks["cross_attention_frequency"]))  # layers that look at the image
    query = encoder.tokens * q + _norm(q)
    query += layers * (_attention(q) + _mlp(q, _inner(asks)) + 2 * _norm(q))
    query += looking * (2 * _linear(q, q) + 2 * _linear(seen, q) + _norm(q))
    return image + query


_NUMBERS: dict[Kind, Callable[[EncoderArgs], int]] = {
    "clip": _clip,
    "convnext": _convnext,
    "dinov2": _dinov2,
    "blip2": _blip2,
    "efficientnet_lite0": lambda _: _LITE_NUMBERS,
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
    """DINOv2's width of a gated MLP: two thirds of the plain one's, in eights."""
    return (int(_inner(values) * 2 / 3) + 7) // 8 * 8


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _norm(width: int) -> int:
    return 2 * width


def _attention(h: int) -> int:
    return 4 * _linear(h, h)


def _mlp(h: int, i: int) -> int:
    return _linear(h, i) + _linear(i, h)
