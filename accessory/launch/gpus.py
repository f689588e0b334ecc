"""Checks how many ranks and which GPUs a user asks for. Commands, demos and `MultiGpuWrapper` use it.

CUDA numbers the GPUs in CUDA_VISIBLE_DEVICES from 0 on. The ids in this file are those numbers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from accessory.errors import InputError

log = logging.getLogger(__name__)


def count_ranks(
    n: int | None,
    ids: Sequence[int] | None = None,
    *,
    shown: int | None = None,
    n_field: str = "gpus",
    ids_field: str = "gpu_ids",
) -> int:
    """The number of ranks: `n`, or one for each GPU of `ids`.

    shown: the number of GPUs; None where that is not known, or the ranks need none. InputError, which begins with
    `n_field` or `ids_field`, where a value is invalid or the two contradict each other.
    """
    if ids is not None:
        if not ids or len(set(ids)) < len(ids) or min(ids) < 0:
            given = " ".join(map(str, ids)) or "none"
            raise InputError(f"{ids_field}: got {given}, but they must be different numbers of GPUs, at least one")
        if n is not None and n != len(ids):
            raise InputError(f"{n_field}: got {n}, but {ids_field} names {len(ids)}; give one of the two")
        if shown is not None and max(ids) >= shown:
            given = " ".join(map(str, ids))
            raise InputError(f"{ids_field}: got {given}, but this machine shows {shown} GPUs, the first of which is 0")
        return len(ids)
    if not isinstance(n, int) or n < 1:
        raise InputError(f"{n_field}: got {n!r}, but it must be a whole number of at least 1")
    if shown is not None and n > shown:
        raise InputError(f"{n_field}: got {n}, but this machine shows {shown} GPUs")
    return n


def visible_gpus() -> list[str] | None:
    """The names in CUDA_VISIBLE_DEVICES; None where it is not set, or empty."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else None


def visible_devices(ids: Sequence[int]) -> str:
    """The CUDA_VISIBLE_DEVICES for a process that must see only the GPUs `ids`, in this order."""
    names = visible_gpus()
    return ",".join(names[i] if names else str(i) for i in ids)


def use_gpus(ids: Sequence[int]) -> None:
    """Let this process see only the GPUs `ids`. Call it before CUDA starts.

    Rank r then uses the r-th of them, and the default GPU of every thread is right.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices(ids)


def default_device() -> str:
    """ "cuda" where torch sees a GPU, else "cpu". Warns where CUDA_VISIBLE_DEVICES is why it sees none."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names and names != "-1" and torch.version.cuda is not None:
        log.warning(
            "CUDA_VISIBLE_DEVICES: got %s, of which torch sees no GPU; computing on the CPU (device cpu says so on "
            "purpose; otherwise name GPUs that `nvidia-smi -L` lists)", names,
        )  # fmt: skip
    return "cpu"


def check_device(given: Any, field: str = "--device") -> str | None:
    """The name of a device: of a name, a torch.device, or the number of a GPU; None for None.

    InputError, which begins with `field`, where torch has no such device. torch itself would print a traceback.
    """
    if given is None:
        return None
    import torch

    wrong = f"{field}: got {given!r:.60}, but "
    try:
        if isinstance(given, bool) or not isinstance(given, str | int | torch.device):
            raise RuntimeError
        device = torch.device(f"cuda:{given}" if isinstance(given, int) else given)
    except RuntimeError as error:
        raise InputError(wrong + "it must be cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(wrong + "it must be cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        hides = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if hides is None else f" (CUDA_VISIBLE_DEVICES={hides!r})"
        raise InputError(wrong + f"torch {torch.__version__} sees {count} CUDA devices here{why}")
    return str(device)
