"""Where images enter the network: what encoders see becomes positions of the residual stream.

An image is, of each of its views, [start, what the queries found, what the encoders saw, end]. Start and end are
learnt; the rest is projected to the network's width and normalised (SPHINX, arXiv 2311.07575). In a row of token ids
its positions bear `IMAGE_ID`, so that lengths, positions, caches and masks know nothing of images.

Legend: B rows, T positions, D dim, V views of all images, N = V · positions of a view, C channels, Q queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.vision_config import IMAGE_ID, VisionArgs

if TYPE_CHECKING:
    from accessory.nn.vision import Features


class Projection(nn.Sequential):
    """A linear from C channels to D, then a LayerNorm; it computes the product in the dtype it is asked for, the
    norm in fp32."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__(nn.Linear(channels, dim), nn.LayerNorm(dim))
        self.channels = channels

    def forward(self, x_VTC: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        """(V, T, D) fp32."""
        linear, norm = self
        assert isinstance(linear, nn.Linear)
        assert isinstance(norm, nn.LayerNorm)
        y_VTD = F.linear(x_VTC.to(dtype), linear.weight.to(dtype), linear.bias.to(dtype)).float()
        return F.layer_norm(y_VTD, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


class ImageTokens(nn.Module):
    """The base of a network that may see: the projections, start and end, where `vision` asks for them.

    Parameters bear the original's names, at the network's top: visual_proj.*, qformer_proj.*, start_img, end_img.
    """

    visual_proj: Projection
    qformer_proj: Projection | None

    def add_images(self, vision: VisionArgs, dim: int) -> None:
        self.visual_proj = Projection(vision.channels, dim)
        self.qformer_proj = None if vision.query is None else Projection(vision.query.channels, dim)
        self.start_img = nn.Parameter(torch.empty(1, 1, dim))
        self.end_img = nn.Parameter(torch.empty(1, 1, dim))

    @property
    def sees(self) -> bool:
        return hasattr(self, "start_img")

    def image_embeddings(self, features: Features | None, dtype: torch.dtype) -> Tensor:
        """(N, D) fp32, the images one after the other; none of them is (0, D), with every parameter taking part."""
        start_11D, end_11D = self.start_img.float(), self.end_img.float()
        if features is None:
            visual_VTC = start_11D.new_empty(0, 1, self.visual_proj.channels)
            query_VQC = None
            if self.qformer_proj is not None:
                query_VQC = start_11D.new_empty(0, 1, self.qformer_proj.channels)
        else:
            visual_VTC, query_VQC = features
        V = visual_VTC.shape[0]
        parts = [start_11D.expand(V, -1, -1)]
        if self.qformer_proj is not None:
            assert query_VQC is not None, "features come from a tower of the same configuration"
            parts.append(self.qformer_proj(query_VQC, dtype))
        parts += [self.visual_proj(visual_VTC, dtype), end_11D.expand(V, -1, -1)]
        return torch.cat(parts, 1).flatten(0, 1)


def place(x_BTD: Tensor, tokens_BT: Tensor, image_ND: Tensor) -> Tensor:
    """Put the words of images where `tokens_BT` says `IMAGE_ID`, in the order of the flattened batch."""
    return x_BTD.masked_scatter((tokens_BT == IMAGE_ID)[..., None], image_ND)
