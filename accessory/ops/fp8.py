"""Products in fp8 on cards that have them. fp8 weights are used as they are stored; inputs are rounded row by row.

Each row of the input is scaled so that its largest number becomes the format's largest. The product's rows and columns
are scaled back at the end. A product with dequantised weights in 16 bits rounds the weights only; this one also rounds
the inputs, to 4 significant bits each. It serves many tokens without gradients: decoding reads weights in place, and
training dequantises exactly.

Legend: T tokens, N rows sorted by expert, E experts, O out, I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.ops.quantized import FP8_LARGEST, Packed


def to_fp8_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """(float8 e4m3 (T, I), fp32 scale (T, 1)) with x ≈ q · scale."""
    scale_T1 = (x_TI.abs().amax(-1, keepdim=True).float() / FP8_LARGEST).clamp_min(1e-12)
    return (x_TI.float() / scale_T1).to(torch.float8_e4m3fn), scale_T1


def fp8_linear(x_TI: Tensor, packed: Packed) -> Tensor:
    """x (T, I) times an fp8 weight (O, I): (T, O) bf16."""
    q_TI, scale_T1 = to_fp8_rows(x_TI)
    return torch._scaled_mm(
        q_TI, packed.data.t(), scale_a=scale_T1, scale_b=packed.scale[None], out_dtype=torch.bfloat16
    )


def fp8_grouped_linear(x_NI: Tensor, packed: Packed, count_E: Tensor) -> Tensor:
    """Rows of x, sorted by expert, times an fp8 stack (E, O, I): (N, O) bf16. `count_E`: rows of each expert."""
    q_NI, scale_N1 = to_fp8_rows(x_NI)
    end_E = count_E.cumsum(0).to(torch.int32)
    return torch._scaled_grouped_mm(
        q_NI, packed.data.transpose(1, 2), scale_N1.squeeze(1), packed.scale, offs=end_E, out_dtype=torch.bfloat16
    )
