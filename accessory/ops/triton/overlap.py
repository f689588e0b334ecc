"""Lets a kernel's programs take their places on the card while the kernel before still runs (Hopper and later).

CUDA calls it programmatic dependent launch. Without it, a card idles for a microsecond or two between kernels, which is
much where a decoding layer has ten kernels of a few microseconds.

Every kernel that is launched so must call `wait_for_inputs` before it reads or writes anything that kernels before it
write or read. Then each one also waits for all before it, since the one before has waited for its own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from accessory.ops.triton.nibbles import permutes


@triton.jit
def wait_for_inputs(OVERLAPS: tl.constexpr):
    """Wait until all kernels before have written their results."""
    if OVERLAPS:
        gdc_wait()


@triton.jit
def let_next_begin(OVERLAPS: tl.constexpr):
    """Let the next kernel's programs begin once all of this kernel's have come here.

    Kernels of a few microseconds call it first. Those that read much call it after their loops: programs that wait take
    room which the rest of these could use.
    """
    if OVERLAPS:
        gdc_launch_dependents()


def overlap(x: Tensor, rows: int | None = None) -> dict[str, Any]:
    """Options for the launch of a kernel that calls `wait_for_inputs`. rows: tokens of the step, by default x's rows.

    Only a step of one token gains by it: 4% in int8, 5% in int4 on an H200. With 16 tokens the kernels fill the card,
    and programs that wait there cost 4 to 10%.
    """
    return _OPTIONS if (len(x) if rows is None else rows) == 1 and _overlaps(x.device) else {}


_OPTIONS = {"OVERLAPS": True, "launch_pdl": True}


@cache
def _overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and permutes() and torch.cuda.get_device_capability(device) >= (9, 0)
