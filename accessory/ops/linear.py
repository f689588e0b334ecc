"""The one place where a weight meets its input: what the weight is decides the product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x (…, I) times a dense weight (O, I), plus bias."""
    return F.linear(x, weight_OI, bias_O)
