"""Linear layers and norms as modules. `ops.linear` chooses the kernel of a product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accessory.formats import Format
from accessory.ops.linear import AdapterRows, LinearAdapter, Weight, linear
from accessory.ops.norm import Exchange, add_rms_norm, rms_norm
from accessory.ops.quantized import Packed, packed_shapes


class PackedWeight(nn.Module):
    """A frozen quantised weight, or a stack, in place of a dense parameter. Loading a checkpoint fills it.

    Its tensors are parameters instead of buffers, so that they are sharded and counted like weights.
    """

    def __init__(self, format: Format, shape: tuple[int, ...], device: torch.device | str) -> None:
        super().__init__()
        self.format, self.shape = format, torch.Size(shape)
        for name, (size, dtype) in packed_shapes(format, shape).items():
            empty = torch.empty(size, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def packed(self) -> Packed:
        return Packed(self.format, **dict(self.named_parameters(recurse=False)))

    @property
    def device(self) -> torch.device:
        return self.get_parameter("data").device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def __len__(self) -> int:
        return self.shape[0]


def product_of(weight: Tensor | PackedWeight) -> Tensor | Packed:
    """A module's weight as `ops.linear` takes it."""
    return weight.packed() if isinstance(weight, PackedWeight) else weight


class Linear(nn.Module):
    """y = x Wᵀ (+ b), (…, O) in x's dtype. Unlike torch's Linear, it is not initialised when it is made.

    A checkpoint or `init_weights` fills it. `add_lora` adds a LoRA adapter (arXiv 2106.09685). `bias_factor` 0 leaves
    the bias out of this rank's part of a sum over ranks, because another rank adds it.
    """

    weight: Any  # nn.Parameter or PackedWeight
    lora_a: Linear | None
    lora_b: Linear | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias: nn.Parameter | None = None
        self.bias_factor = 1.0
        self.lora_a, self.lora_b, self.lora_scale = None, None, 1.0
        self.adapters: Weight | None = None  # several, of which each row takes one; their weight is this one's

    def add_bias(self) -> None:
        dtype = self.weight.dtype if isinstance(self.weight, nn.Parameter) else torch.float32
        self.bias = nn.Parameter(torch.empty(self.weight.shape[0], dtype=dtype, device=self.weight.device))

    def add_lora(self, rank: int, scale: float) -> None:
        dtype = self.weight.dtype if isinstance(self.weight, nn.Parameter) else torch.float32
        with torch.device(self.weight.device):
            self.lora_a = Linear(self.weight.shape[1], rank).to(dtype)
            self.lora_b = Linear(rank, self.weight.shape[0]).to(dtype)
        self.lora_scale = scale

    def set_adapters(self, adapters: Sequence[LinearAdapter | None]) -> None:
        """Stand several adapters beside the weight, in place of those before; None: one without a part here.

        They stay where they are when the module is moved or cast.
        """
        beside = self.weights().with_adapters(adapters)
        self.adapters = beside if beside.several else None

    def weights(self) -> Weight:
        """The weight with its bias and its LoRA adapters."""
        bias = self.bias if self.bias is None or self.bias_factor == 1.0 else self.bias * self.bias_factor
        weight = product_of(self.weight)
        if self.adapters is not None:
            return self.adapters._replace(weight=weight, bias=bias)
        if self.lora_a is None or self.lora_b is None:
            return Weight(weight, bias)
        return Weight(weight, bias, self.lora_a.weight, self.lora_b.weight, self.lora_scale)

    def forward(self, x: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        """adapters: the adapter of each of x's rows, where there are several; None: no row takes one."""
        return linear(x, self.weights(), adapters=adapters)


class RMSNorm(nn.Module):
    """x / rms(x) · w (arXiv 1910.07467), fp32 in and out."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.adapters: Tensor | None = None  # (1 + A, dim) fp32: the weight, and that of each of several adapters
        self.exchange: Exchange | None = None  # what sums the layer's output over ranks, if the norm has to

    def set_adapters(self, weights: Sequence[Tensor | None]) -> None:
        """Have a weight of its own for each of several adapters; None: one that keeps this one."""
        own = self.weight.detach().float()
        changed = any(weight is not None for weight in weights)
        self.adapters = torch.stack([own, *(own if w is None else w.float() for w in weights)]) if changed else None

    def forward(self, x: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        """adapters: the adapter of each of x's rows, where there are several; None: no row takes one."""
        if self.adapters is None or adapters is None:
            return rms_norm(x, self.weight.float(), self.eps)
        weight_ND = self.adapters[adapters.number_N + 1]
        return rms_norm(x, torch.ones_like(self.adapters[0]), self.eps) * weight_ND.view(x.shape)

    def after(
        self, x: Tensor, y: Tensor | None, dtype: torch.dtype, adapters: AdapterRows | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x + y, its norm in `dtype`): the residual stream after a layer's output y. None: nothing is added."""
        exchange = self.exchange_of(y)
        if self.adapters is None or adapters is None:
            return add_rms_norm(x, y, self.weight.float(), self.eps, dtype, exchange)
        if exchange is not None:
            x, y = add_rms_norm(x, y, self.weight.float(), self.eps, dtype, exchange)[0], None
        x = x if y is None else x + y
        return x, self(x, adapters).to(dtype)

    def exchange_of(self, y: Tensor | None) -> Exchange | None:
        """What sums a layer's output y over ranks in the norm's launch; None where it is the whole sum already."""
        return self.exchange if self.exchange is not None and y is not None and self.exchange.takes(y) else None
