"""Image encoder ensembles of a few dozen channels with random weights, and images for them."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from accessory.nn.vision import VisionTower
from accessory.vision_config import SPHINX, EncoderArgs, VisionArgs


def _small(encoder: EncoderArgs, size: int, **config: Any) -> EncoderArgs:
    """One of the ensemble's encoders with other sizes; a dict changes only the given keys of its part of the config."""
    parts = {key: encoder.config[key] | value for key, value in config.items() if isinstance(value, dict)}
    return replace(encoder, size=size, config=encoder.config | config | parts)


CLIP = _small(
    SPHINX.encoders[0],
    28,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=28,
)
CONVNEXT = _small(SPHINX.encoders[1], 64, depths=[1, 2, 1, 1], hidden_sizes=[8, 16, 24, 40])
DINOV2 = _small(SPHINX.encoders[2], 28, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=70)
_NARROW = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
assert SPHINX.query is not None
QFORMER = _small(
    SPHINX.query,
    28,
    num_query_tokens=3,
    vision=_NARROW | {"hidden_size": 32, "image_size": 28},
    qformer=_NARROW | {"hidden_size": 24, "encoder_hidden_size": 32},
)


def tiny_sphinx() -> VisionArgs:
    """SPHINX's four encoders, small: each 64 × 64 view gives 5 tokens of 32 + 40 + 48 channels and 3 queries of 24."""
    return VisionArgs(encoders=(CLIP, CONVNEXT, DINOV2), query=QFORMER)


def tiny_clip() -> VisionArgs:
    """One small encoder and no query: 28 × 28 pixels give 5 tokens of 32 channels."""
    return VisionArgs(encoders=(CLIP,))


def random_tower(
    args: VisionArgs | None = None,
    views: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    cache_bytes: int = 2**20,
) -> VisionTower:
    """A tower with random weights that all matter: none keeps its initial zero or one."""
    tower = VisionTower(args or tiny_sphinx(), views, cache_bytes=cache_bytes)
    randomise(tower, seed)
    return tower.to(dtype)


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Draws weights around zero, and norms and layer scales around one; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(module.state_dict(keep_vars=True).items()):
            if not p.is_floating_point():
                continue
            noise = torch.randn(p.shape, generator=generator)
            scales = p.dim() == 1 and name.endswith(("weight", "gamma", "lambda1", "layer_scale_parameter"))
            fan_in = p[0].numel() if p.dim() > 1 else 1
            if name.endswith("running_var"):
                p.copy_(noise.abs() + 0.5)
            else:
                p.copy_(1 + 0.1 * noise if scales else noise * (0.1 if p.dim() == 1 else fan_in**-0.5))


def random_pixels(args: VisionArgs, images: int = 1, views: int = 1, seed: int = 0) -> Tensor:
    """Random pixels (images, 3, P, P), fp32, about as CLIP normalises; smooth, so that resizing does not erase them."""
    generator = torch.Generator().manual_seed(seed)
    size = args.pixels(views)
    coarse = torch.randn(images, 3, 9, 9, generator=generator)
    fine = torch.randn(images, 3, size, size, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") + 0.2 * fine


def import_foreign(name: str) -> ModuleType:
    """Imports a library that weights were published with, or skips the test and names the library.

    Install them with `pip install --no-deps --target FOLDER timm open_clip_torch ftfy wcwidth`. Put FOLDER in
    PYTHONPATH only for the tests that need them: without torchvision, transformers finds timm but cannot import it.

    The libraries import torchvision, but the tests use nothing of it. If it is missing or does not fit this torch,
    stand-in modules replace it during the import and are removed afterwards.
    """
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    finder = _StandIn()
    try:
        import torchvision  # noqa: F401
    except Exception:
        for key in [key for key in sys.modules if key.split(".")[0] == "torchvision"]:
            del sys.modules[key]
        sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(name)
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
            for key in [key for key in sys.modules if key.split(".")[0] == "torchvision"]:
                del sys.modules[key]


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of torchvision and makes it an `_Anything`."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Anything(ModuleType):
    """A module that has every name; each is a new class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (torch.nn.Module,), {})


class _Names(type):
    """Metaclass of these classes: an attribute is its own name, as the class may stand in for an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return name
