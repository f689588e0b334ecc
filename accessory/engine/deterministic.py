"""Whether a machine has the kernels with which a request's bits depend on no other request."""

from __future__ import annotations

import torch

from accessory.errors import InputError
from accessory.ops import dispatch, machine


def check_deterministic(device: torch.device, dtype: torch.dtype, fp8: bool, field: str) -> None:
    """InputError where it has not; a CPU has.

    fp8: whether keys and values are in fp8. field: what asked for the kernels.
    """
    if device.type != "cuda":
        return
    if not dispatch.has_triton():
        lacking = machine.triton_lacks() or "Triton (pip install triton)"
        raise InputError(f"{field}: on a GPU it needs {lacking}; or leave it out, or take the device cpu")
    with dispatch.fixing("decode"):
        attention = dispatch.find(dispatch.over_pages("attention", device, dtype, fp8))
    if attention is None:
        least = "8.9 for keys and values in fp8" if fp8 else "8.0"
        card, has = torch.cuda.get_device_name(device), ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise InputError(f"{field}: it needs a GPU of compute capability {least}, but {card} has {has}; leave it out")
