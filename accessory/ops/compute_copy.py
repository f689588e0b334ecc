"""Trained fp32 parameters in the dtype of the products: cast as they are needed, or as a copy that stays.

A copy stays at one place in memory, so that CUDA graphs may read it, and the optimiser may write it while it has the
parameter in its registers. It is never handed out stale: `current` compares the parameter's version and place with
those that the copy was made of, and casts anew where either has changed. torch counts a version up with each write,
also through `detach()` and views. What writes past it, as kernels do and `.data`, says so: `written` or `forget`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class ComputeCopy:
    """The copy of one parameter in another dtype, contiguous as the parameter is."""

    def __init__(self, parameter: Tensor, dtype: torch.dtype) -> None:
        self.tensor = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        self._seen: tuple[int, int] | None = None

    def is_current(self, parameter: Tensor) -> bool:
        return self._seen == _state(parameter)

    def current(self, parameter: Tensor) -> Tensor:
        """The copy, with the parameter's values of now."""
        if not self.is_current(parameter):
            refresh([parameter])
        return self.tensor

    def written(self, parameter: Tensor) -> None:
        """Somebody has written the parameter's values of now into `tensor`."""
        self._seen = _state(parameter)

    def forget(self) -> None:
        """Somebody has written the parameter, and torch may not know of it."""
        self._seen = None


def _state(parameter: Tensor) -> tuple[int, int]:
    return parameter._version, parameter.data_ptr()


def keep_copy(parameter: Tensor, dtype: torch.dtype) -> None:
    """From now on, `in_dtype` takes a copy of the leaf `parameter` that stays."""
    copy = copy_of(parameter)
    if copy is None or copy.tensor.dtype != dtype:
        parameter.compute_copy = ComputeCopy(parameter, dtype)  # type: ignore[attr-defined]


def copy_of(parameter: Tensor) -> ComputeCopy | None:
    """The copy that stays, if there is one."""
    return getattr(parameter, "compute_copy", None)


@torch.no_grad()
def refresh(parameters: Iterable[Tensor]) -> None:
    """Cast anew where a copy is no longer current. A GPU does it in few launches."""
    copies = [(copy, p) for p in parameters if (copy := copy_of(p)) is not None and not copy.is_current(p)]
    if not copies:
        return
    torch._foreach_copy_([copy.tensor for copy, _ in copies], [p for _, p in copies])
    for copy, p in copies:
        copy.written(p)


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)`, or the copy that stays. The gradient is that of a cast."""
    if weight.dtype == dtype:
        return weight
    copy = copy_of(weight)
    if copy is None or copy.tensor.dtype != dtype:
        return weight.to(dtype)
    tensor = copy.current(weight)
    return _Cast.apply(weight, tensor) if weight.requires_grad and torch.is_grad_enabled() else tensor


class _Cast(torch.autograd.Function):
    """The cast of `weight` that `copy` holds."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None
