"""The configuration of image encoders: which there are, and how many views and image tokens an image takes.

The default is the ensemble of SPHINX (arXiv 2311.07575): CLIP ViT-L/14, ConvNeXt-XXL and DINOv2 ViT-g/14, whose
channels are concatenated, and BLIP-2's Q-Former with an image encoder of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from accessory.errors import ConfigError

Kind = Literal["clip", "convnext", "dinov2", "blip2", "efficientnet_lite0"]
KINDS: tuple[Kind, ...] = ("clip", "convnext", "dinov2", "blip2", "efficientnet_lite0")
VIEWS = (1, 5)

CACHE_BYTES = 256 * 2**20  # size of the feature cache, which saves encoding an image again
VIEWS_AT_ONCE = 16  # bounds the memory that encoding many images takes
# A CUDA graph keeps the memory of its views, so only few views are one: an image's. A card with more views at once has
# work enough not to wait for the host. There is a graph for each number of images and each part of their views.
VIEWS_A_GRAPH, MOST_GRAPHS = 5, 8

# The id of image tokens among token ids. No tokenizer has it. `data.image_tokens` inserts it.
IMAGE_ID = -1

# The names of the trained tensors that turn the encoders' output into image tokens. Then the prefixes of the frozen
# encoders' tensors: ours, and those of the original's checkpoints.
PROJECTION = re.compile(r"(visual_proj|qformer_proj)\.[01]\.(weight|bias)|(start|end)_img")
ENCODER_PREFIXES = ("vision.", "clip.", "openclip_convnext_xxl.", "dinov2_vitg14.", "qformer.")

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LITE = (127 / 255,) * 3, (128 / 255,) * 3
_PATCH = 32  # width and height, in pixels, that one token of a convolutional encoder covers


@dataclass(frozen=True, kw_only=True)
class EncoderArgs:
    """One encoder. The names of its tensors begin with `vision.<name>.`; its class is built from `config`.

    config: the keys of a configuration class of transformers: CLIPVisionConfig for clip, Dinov2Config for dinov2,
    ConvNextConfig for convnext. For blip2: "vision" (keys of Blip2VisionConfig), "qformer" (keys of Blip2QFormerConfig)
    and "num_query_tokens". For efficientnet_lite0: nothing. Two keys are not from transformers, `norm_eps` of convnext
    and `interpolate_offset` of dinov2; nn/vision_encoders.py explains them. path: a folder or hf:// address with the
    weights, used if the checkpoint holds none.
    """

    name: str
    kind: Kind
    size: int  # width and height of a view, in pixels
    config: dict[str, Any] = field(default_factory=dict)
    path: str | None = None

    def __post_init__(self) -> None:
        _check(isinstance(self.name, str) and self.name.isidentifier(), "name", self.name, "a name, as clip")
        _check(self.kind in KINDS, "kind", self.kind, "one of " + ", ".join(KINDS))
        whole = isinstance(self.size, int) and not isinstance(self.size, bool)
        _check(whole and self.size >= 1, "size", self.size, "a whole number of pixels")
        _check(isinstance(self.config, Mapping), "config", self.config, "an object of keys and values")
        _check(self.path is None or isinstance(self.path, str), "path", self.path, "a folder or hf:// address")
        step = self._step
        _check(step is None or self.size % step == 0, "size", self.size, f"a multiple of {step} pixels")

    @property
    def _step(self) -> int | None:
        if self.kind in ("clip", "dinov2"):
            return int(self.value("patch_size"))
        return None if self.kind == "blip2" else _PATCH

    def value(self, key: str, part: str | None = None) -> Any:
        """The value of `key` in `config`, or in its section `part`; ConfigError if it is missing."""
        values: Any = self.config if part is None else self.config.get(part, {})
        if key not in values:
            name = key if part is None else f"{part}.{key}"
            raise ConfigError(f"vision: encoder {self.name}: config.{name} is missing")
        return values[key]

    @property
    def channels(self) -> int:
        """The channels of each token that the encoder gives."""
        if self.kind == "blip2":
            return int(self.value("hidden_size", "qformer"))
        if self.kind == "convnext":
            return int(self.value("hidden_sizes")[-1])
        return 1280 if self.kind == "efficientnet_lite0" else int(self.value("hidden_size"))

    @property
    def tokens(self) -> int:
        """The tokens that the encoder gives per view: its queries, or a class token and one for each patch."""
        if self.kind == "blip2":
            return int(self.value("num_query_tokens"))
        return (self.size // (self._step or 1)) ** 2 + 1

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of red, green and blue (0 … 1) with which the encoder was trained."""
        return {"dinov2": _IMAGENET, "efficientnet_lite0": _LITE}.get(self.kind, (CLIP_MEAN, CLIP_STD))


@dataclass(frozen=True, kw_only=True)
class VisionArgs:
    """All encoders of a model.

    `encoders` give equally many tokens, and their channels are concatenated. `query` is another encoder, a Q-Former, or
    None.
    """

    encoders: tuple[EncoderArgs, ...]
    query: EncoderArgs | None = None

    def __post_init__(self) -> None:
        encoders = tuple(_encoder(e) for e in self.encoders)
        object.__setattr__(self, "encoders", encoders)
        if self.query is not None:
            object.__setattr__(self, "query", _encoder(self.query))
        _check(bool(encoders), "encoders", (), "at least one")
        names = [e.name for e in self.all]
        _check(len(set(names)) == len(names), "encoders", names, "of different names")
        tokens = {e.name: e.tokens for e in encoders}
        _check(len(set(tokens.values())) == 1, "encoders", tokens, "of as many tokens each; change a size")
        kinds = {e.name: e.kind for e in encoders if e.kind == "blip2"}
        _check(not kinds, "encoders", kinds, "no blip2, which is a query")
        _check(self.query is None or self.query.kind == "blip2", "query", self.query and self.query.kind, "a blip2")

    @classmethod
    def parse(cls, value: object) -> VisionArgs | None:
        """Parse "vision" of config.json: a preset's name, an object with `encoders` and `query`, or None."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, str):
            _check(value in VISION_PRESETS, "preset", value, "one of " + ", ".join(VISION_PRESETS))
            return VISION_PRESETS[value]
        if not isinstance(value, Mapping):
            raise ConfigError(f"vision: got {value!r:.60}, but it must be a preset's name or an object with encoders")
        _known(value, cls, "vision")
        return cls(encoders=tuple(value.get("encoders") or ()), query=value.get("query"))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def published(self) -> VisionArgs:
        """A copy in which SPHINX's encoders have the address where they are published, unless they have a path."""
        found = {e.name: replace(e, path=PUBLISHED[e.name]) for e in self.all if not e.path and e in SPHINX.all}
        query = None if self.query is None else found.get(self.query.name, self.query)
        return VisionArgs(encoders=tuple(found.get(e.name, e) for e in self.encoders), query=query)

    @property
    def all(self) -> tuple[EncoderArgs, ...]:
        return self.encoders if self.query is None else (*self.encoders, self.query)

    @property
    def channels(self) -> int:
        return sum(e.channels for e in self.encoders)

    def image_tokens(self, views: int) -> int:
        """The number of image tokens per image: for each view a start, the queries, the encoders' tokens and an end."""
        queries = 0 if self.query is None else self.query.tokens
        return views * (queries + self.encoders[0].tokens + 2)

    def projection_shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the projections to image tokens of width `dim`: linears with LayerNorms, and start and end."""
        shapes: dict[str, tuple[int, ...]] = {}
        channels = {"visual_proj": self.channels}
        if self.query is not None:
            channels["qformer_proj"] = self.query.channels
        for name, C in channels.items():
            shapes |= {f"{name}.0.weight": (dim, C), f"{name}.0.bias": (dim,)}
            shapes |= {f"{name}.1.weight": (dim,), f"{name}.1.bias": (dim,)}
        return shapes | {"start_img": (1, 1, dim), "end_img": (1, 1, dim)}

    def pixels(self, views: int) -> int:
        """Width and height of the prepared image: the size of the largest encoder, or twice that for five views."""
        return max(e.size for e in self.all) * (1 if views == 1 else 2)


def _encoder(value: object) -> EncoderArgs:
    if isinstance(value, EncoderArgs):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"vision: encoders: got {value!r:.60}, but each must be an object with name, kind and size")
    _known(value, EncoderArgs, "vision: encoders")
    missing = [name for name in ("name", "kind", "size") if name not in value]
    if missing:
        raise ConfigError(f"vision: encoders: {missing[0]} is missing; each has name, kind and size")
    return EncoderArgs(**value)


def _known(value: Mapping[str, Any], cls: Any, where: str) -> None:
    names = [f.name for f in fields(cls)]
    unknown = sorted(set(value) - set(names))
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(names)}")


def _check(condition: bool, name: str, given: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"vision: {name}: got {given!r}, but it must be {wanted}")


SPHINX = VisionArgs(
    encoders=(
        EncoderArgs(
            name="clip",
            kind="clip",
            size=224,
            config={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 224,
                "patch_size": 14,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-5,
            },
        ),
        EncoderArgs(
            name="convnext",
            kind="convnext",
            size=512,
            config={
                "depths": [3, 4, 30, 3],
                "hidden_sizes": [384, 768, 1536, 3072],
                "layer_norm_eps": 1e-5,
                "norm_eps": 1e-5,
            },
        ),
        EncoderArgs(
            name="dinov2",
            kind="dinov2",
            size=224,
            config={
                "hidden_size": 1536,
                "num_hidden_layers": 40,
                "num_attention_heads": 24,
                "mlp_ratio": 4,
                "image_size": 518,
                "patch_size": 14,
                "use_swiglu_ffn": True,
                "layer_norm_eps": 1e-6,
                "interpolate_offset": 0.1,
            },
        ),
    ),
    query=EncoderArgs(
        name="qformer",
        kind="blip2",
        size=224,
        config={
            "num_query_tokens": 32,
            "vision": {
                "hidden_size": 1408,
                "intermediate_size": 6144,
                "num_hidden_layers": 39,
                "num_attention_heads": 16,
                "image_size": 224,
                "patch_size": 14,
            },
            "qformer": {
                "hidden_size": 768,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "intermediate_size": 3072,
                "encoder_hidden_size": 1408,
                "cross_attention_frequency": 2,
            },
        },
    ),
)
PUBLISHED = {
    "clip": "hf://openai/clip-vit-large-patch14",
    "convnext": "hf://laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
    "dinov2": "hf://facebook/dinov2-giant",
    "qformer": "hf://Salesforce/blip2-opt-2.7b",
}
VISION_PRESETS: dict[str, VisionArgs] = {
    "sphinx": SPHINX,
    # One small encoder, pretrained on photographs: for CPUs.
    "small": VisionArgs(encoders=(EncoderArgs(name="efficientnet", kind="efficientnet_lite0", size=224),)),
}
