"""Images in the decoder: the encoders' features become image tokens of the residual stream.

Each view of an image becomes [start, query tokens, encoder tokens, end]. Start and end are learnt. The other tokens are
projected to the network's width and normalised (SPHINX, arXiv 2311.07575). In a row of token ids, image tokens have the
id `IMAGE_ID`. So lengths, positions, caches and masks treat them like other tokens.

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
    """A linear layer from C channels to D, then a LayerNorm. The product is in the dtype of the call, the norm in
    fp32."""

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
    """The base class of a decoder that may take images. `add_images` adds the projections, start and end.

    The parameters have the original's names, without a prefix: visual_proj.*, qformer_proj.*, start_img, end_img.
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
        """The image tokens (N, D) fp32, image after image.

        Without features the result is (0, D), and every parameter still takes part in it.
        """
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
    """Put the image tokens where `tokens_BT` is `IMAGE_ID`, in the order of the flattened batch: (B, T, D)."""
    return x_BTD.masked_scatter((tokens_BT == IMAGE_ID)[..., None], image_ND)
