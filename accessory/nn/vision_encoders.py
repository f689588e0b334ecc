"""The image encoders: builds each from its configuration, and runs it on views.

Legend: V views, S height and width of a view in pixels, T tokens, C channels, h height and width in positions, Q
queries.

The networks are classes of transformers, except EfficientNet-Lite0. Published weights were trained with other
libraries, which differ from those classes in two things. Two keys of the configuration set them:

* convnext `norm_eps`: the epsilon of every LayerNorm except the last. transformers always uses 1e-6 there; timm's
  convnext_xxlarge uses 1e-5. (`layer_norm_eps` is the epsilon of the last LayerNorm.)
* dinov2 `interpolate_offset`: the position embeddings were learnt for `image_size` pixels and are resampled to `size`
  pixels. DINOv2's hub models resample with the scale (h + 0.1) / h₀, transformers with h / h₀; both without
  antialiasing. Without the key, the scale is that of transformers.

CLIP's `hidden_act` matters too: OpenAI's weights were trained with quick_gelu, LAION's of the same size with gelu.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.errors import AccessoryError, ConfigError, MissingExtraError
from accessory.vision_config import EncoderArgs, Kind

_STRIDE = 32  # convolutional encoders: pixels between neighbouring positions


class _Resampled(NamedTuple):
    """Position embeddings resampled to a view's size, kept as long as `learnt` is in `state`.

    Torch's bicubic kernel goes through the channels in turn, and a GPU does nothing else meanwhile.
    """

    learnt: Tensor
    state: tuple[object, ...]
    positions_1TC: Tensor


class Blip2(nn.Module):
    """BLIP-2's image encoder and Q-Former (arXiv 2301.12597), with the parameter names of transformers' Blip2Model."""

    def __init__(self, encoder: EncoderArgs) -> None:
        super().__init__()
        transformers = _transformers(encoder)
        vision = _configuration(encoder, transformers.Blip2VisionConfig, "vision", image_size=encoder.size)
        _check_size(encoder, vision.image_size, "vision.image_size")
        query = _configuration(encoder, transformers.Blip2QFormerConfig, "qformer")
        if query.encoder_hidden_size != vision.hidden_size:
            raise ConfigError(
                f"vision: encoder {encoder.name}: config.qformer.encoder_hidden_size: got {query.encoder_hidden_size}, "
                f"but it must be vision.hidden_size, {vision.hidden_size}"
            )
        self.query_tokens = nn.Parameter(torch.zeros(1, encoder.tokens, query.hidden_size))
        self.vision_model = transformers.Blip2VisionModel(vision)
        self.qformer = transformers.Blip2QFormerModel(query)

    def forward(self, pixels_V3SS: Tensor) -> Tensor:
        image_VTC = self.vision_model(pixel_values=pixels_V3SS).last_hidden_state
        query_VQC = self.query_tokens.expand(len(image_VTC), -1, -1)
        return self.qformer(query_embeds=query_VQC, encoder_hidden_states=image_VTC).last_hidden_state


def build_encoder(encoder: EncoderArgs) -> nn.Module:
    """Build an encoder with random weights; `torch.device("meta")` gives one without values.

    Its state dict has the names of transformers' class or of EfficientNetLite0; for blip2, those of the image encoder
    and the Q-Former in Blip2Model. Raises ConfigError for a configuration that its class does not accept,
    MissingExtraError without transformers.
    """
    try:
        return _BUILD[encoder.kind](encoder)
    except (AccessoryError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers' checks raise many kinds of errors
        reason = " ".join(str(error).split())
        raise ConfigError(f"vision: encoder {encoder.name}: config: cannot be built ({reason[:200]})") from error


def run_encoder(kind: Kind, module: nn.Module, pixels_V3SS: Tensor) -> Tensor:
    """The tokens (V, T, C) of views. Views have the encoder's normalisation; views, weights and tokens have one dtype.

    clip and dinov2: the class token, then patches in reading order, after the final LayerNorm, without a projection.
    convnext and efficientnet_lite0: the mean of the last feature map as class token, then the map's positions in
    reading order (convnext: after its LayerNorm). blip2: the Q-Former's queries.
    """
    return _RUN[kind](module, pixels_V3SS)


def _build_clip(encoder: EncoderArgs) -> nn.Module:
    transformers = _transformers(encoder)
    config = _configuration(encoder, transformers.CLIPVisionConfig, image_size=encoder.size)
    _check_size(encoder, config.image_size, "image_size")
    return transformers.CLIPVisionModel(config)


def _build_convnext(encoder: EncoderArgs) -> nn.Module:
    transformers = _transformers(encoder)
    config = _configuration(encoder, transformers.ConvNextConfig)
    stride = config.patch_size * 2 ** (len(config.depths) - 1)
    if stride != _STRIDE or len(config.hidden_sizes) != len(config.depths):
        raise ConfigError(
            f"vision: encoder {encoder.name}: config: got depths {config.depths}, hidden_sizes {config.hidden_sizes} "
            f"and patch_size {config.patch_size}, but there must be four stages and a patch_size of 4"
        )
    model = transformers.ConvNextModel(config)
    eps = _number(encoder, "norm_eps")
    for name, module in model.named_modules():
        if eps is not None and isinstance(module, nn.LayerNorm) and name != "layernorm":
            module.eps = eps
    return model


def _build_dinov2(encoder: EncoderArgs) -> nn.Module:
    transformers = _transformers(encoder)
    # The mask token is used in pretraining only, and not every file of weights has it.
    config = _configuration(encoder, transformers.Dinov2Config, image_size=encoder.size, use_mask_token=False)
    model = transformers.Dinov2Model(config)
    offset = _number(encoder, "interpolate_offset")
    theirs = type(model.embeddings).interpolate_pos_encoding

    @torch.inference_mode(False)
    @torch.no_grad()
    def positions(embeddings: Any, x_VTC: Tensor, height: int, width: int) -> Tensor:
        learnt_1TC, kept = embeddings.position_embeddings, embeddings.resampled
        version = None if learnt_1TC.is_inference() else learnt_1TC._version
        state = version, learnt_1TC.dtype, learnt_1TC.device, height, width
        if kept is None or kept.learnt is not learnt_1TC or kept.state != state:
            if offset:
                sizes = height // config.patch_size, width // config.patch_size
                new_1TC = resampled_positions(learnt_1TC, sizes, offset)
            else:
                new_1TC = theirs(embeddings, x_VTC, height, width)
            kept = embeddings.resampled = _Resampled(learnt_1TC, state, new_1TC)
        return kept.positions_1TC

    model.embeddings.resampled = None
    model.embeddings.interpolate_pos_encoding = MethodType(positions, model.embeddings)
    return model


def _build_efficientnet(encoder: EncoderArgs) -> nn.Module:
    from accessory.nn.efficientnet import EfficientNetLite0

    if encoder.config:
        raise ConfigError(f"vision: encoder {encoder.name}: config: got {encoder.config!r:.60}, but it has none")
    return EfficientNetLite0()


def resampled_positions(positions_1TC: Tensor, sizes: tuple[int, int], offset: float) -> Tensor:
    """Resample learnt position embeddings to `sizes` = (h, w), bicubically and in fp32: (1, 1 + h·w, C).

    The class token's embedding comes first and is not changed. The scale is (h + offset) / h₀, so sampling points are
    a little closer together than with h / h₀. Returns the dtype of `positions_1TC`.
    """
    old = math.isqrt(positions_1TC.shape[1] - 1)
    if sizes == (old, old):
        return positions_1TC
    class_11C, patch_1TC = positions_1TC[:, :1], positions_1TC[:, 1:]
    grid_1Chh = patch_1TC.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    scale = [(n + offset) / old for n in sizes]
    grid_1Chw = F.interpolate(grid_1Chh, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([class_11C, grid_1Chw.flatten(2).transpose(1, 2).to(positions_1TC.dtype)], dim=1)


def _run_clip(module: Any, pixels_V3SS: Tensor) -> Tensor:
    return module.post_layernorm(module(pixel_values=pixels_V3SS).last_hidden_state)


def _run_convnext(module: Any, pixels_V3SS: Tensor) -> Tensor:
    map_VChh = module(pixel_values=pixels_V3SS).last_hidden_state
    return _mean_in_front(module.layernorm(map_VChh.flatten(2).transpose(1, 2)))


def _run_dinov2(module: Any, pixels_V3SS: Tensor) -> Tensor:
    return module(pixel_values=pixels_V3SS).last_hidden_state


def _run_efficientnet(module: Any, pixels_V3SS: Tensor) -> Tensor:
    return _mean_in_front(module(pixels_V3SS).flatten(2).transpose(1, 2))


def _run_blip2(module: Any, pixels_V3SS: Tensor) -> Tensor:
    return module(pixels_V3SS)


def _mean_in_front(tokens_VTC: Tensor) -> Tensor:
    return torch.cat([tokens_VTC.mean(dim=1, keepdim=True), tokens_VTC], dim=1)


_BUILD: dict[Kind, Callable[[EncoderArgs], nn.Module]] = {
    "clip": _build_clip,
    "convnext": _build_convnext,
    "dinov2": _build_dinov2,
    "blip2": Blip2,
    "efficientnet_lite0": _build_efficientnet,
}
_RUN: dict[Kind, Callable[[Any, Tensor], Tensor]] = {
    "clip": _run_clip,
    "convnext": _run_convnext,
    "dinov2": _run_dinov2,
    "blip2": _run_blip2,
    "efficientnet_lite0": _run_efficientnet,
}
# Keys of `config` that are not transformers'.
_OWN_KEYS: dict[Kind, frozenset[str]] = {
    "convnext": frozenset(["norm_eps"]),
    "dinov2": frozenset(["interpolate_offset"]),
}


def _transformers(encoder: EncoderArgs) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            f"vision: encoder {encoder.name} needs transformers: pip install 'mixtral-accessory[vision]'"
        ) from error
    return transformers


def _configuration(encoder: EncoderArgs, config_class: Any, part: str | None = None, **otherwise: Any) -> Any:
    """transformers' configuration from the encoder's values; `otherwise` has defaults. ConfigError for unknown keys.

    transformers itself would accept a misspelt key, and use the default of the right key.
    """
    values = encoder.config if part is None else encoder.config.get(part, {})
    where = f"vision: encoder {encoder.name}: config" + (f".{part}" if part else "")
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: got {values!r:.60}, but it must be an object of keys and values")
    own = _OWN_KEYS.get(encoder.kind, frozenset())
    theirs = {key: value for key, value in values.items() if key not in own}
    unknown = sorted(theirs.keys() - config_class().to_dict().keys())
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; it takes those of {config_class.__name__}")
    return config_class(**{**otherwise, **theirs})


def _check_size(encoder: EncoderArgs, image_size: object, key: str) -> None:
    if image_size != encoder.size:
        raise ConfigError(
            f"vision: encoder {encoder.name}: config.{key}: got {image_size!r}, but it must be its size, {encoder.size}"
        )


def _number(encoder: EncoderArgs, key: str) -> float | None:
    value = encoder.config.get(key)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0):
        return value
    raise ConfigError(
        f"vision: encoder {encoder.name}: config.{key}: got {value!r}, but it must be a number, 0 or more"
    )
