"""AdamW (arXiv 1711.05101) over this rank's parts of the trained parameters, and how a large update is cut into pieces.

The factor that clips gradients and undoes fp16's loss scale is part of the update. A GPU's kernels read it there: no
pass over the gradients comes before, and the host does not wait for their norm. Large parameters have a kernel of ours
(`ops.triton.adamw`). It reads gradients in bf16 as they are, and writes the parameter's 16-bit copy too, where products
read one. Elsewhere torch makes the update, and gradients in bf16 are widened piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from accessory.limits import OPTIMIZER_PIECE
from accessory.ops import dispatch
from accessory.ops.compute_copy import copy_of
from accessory.parallel.local_shard import local

BETAS = (0.9, 0.95)
EPS = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")
_ALIGNED = 64  # numbers; torch's kernels read several at once


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to norms, biases, and the embeddings that begin and end an image."""
    return not (name.endswith(("norm.weight", "bias", "_img")) or parameter.dim() < 2)


@dataclass(frozen=True)
class Piece:
    """Some numbers of one parameter, with their gradients and moments: the whole parameter, or flat parts of each.

    kernel: our own, for all pieces of a parameter or none, so that its bits do not depend on the pieces; None: torch's.
    copy: the numbers in the dtype of the products, which our kernel writes too.
    """

    value: Tensor
    gradient: Tensor
    moments: Mapping[str, Tensor]
    kernel: dispatch.Kernel | None = None
    copy: Tensor | None = None

    @property
    def widened(self) -> bool:
        """Whether the gradient must become fp32 first."""
        return self.kernel is None and self.gradient.dtype != self.value.dtype

    def cut(self, size: int) -> Iterator[Piece]:
        """Flat parts of at most `size` numbers. A moment that has one number for several is cut at the same places."""
        value, gradient = self.value.view(-1), self.gradient.reshape(-1)
        for start in range(0, value.numel(), size):
            moments = {}
            for name, moment in self.moments.items():
                each = self.value.numel() // moment.numel()
                moments[name] = moment.view(-1)[start // each : (start + size) // each]
            copy = None if self.copy is None else self.copy.view(-1)[start : start + size]
            part = replace(self, value=value[start : start + size], gradient=gradient[start : start + size])
            yield replace(part, moments=moments, copy=copy)


def aligned(numel: int) -> int:
    """The numbers that a tensor of `numel` takes of a buffer in which each tensor begins where one of its own would."""
    return -(-numel // _ALIGNED) * _ALIGNED


def buckets(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Lists of pieces, each cut so that no list takes more than `size` numbers of a buffer."""
    bucket: list[Piece] = []
    held = 0
    for part in (part for piece in pieces for part in piece.cut(size)):
        taken = aligned(part.value.numel())
        if bucket and held + taken > size:
            yield bucket
            bucket, held = [], 0
        bucket.append(part)
        held += taken
    if bucket:
        yield bucket


class AdamW:
    """AdamW over (name, parameter) pairs. The moments are fp32 and lie beside the parameters.

    Attributes, as torch's optimisers have them: `param_groups`, dictionaries with "params", "lr" and "weight_decay";
    `state`, this rank's moments of each parameter, by name. `updates`: how often the parameters were moved, if the
    caller of `step` takes back those that moved nothing.
    `moved`: called with each parameter when its update has been begun.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], weight_decay: float) -> None:
        self.named = list(named)
        self.param_groups: list[dict[str, Any]] = []
        for decay in (True, False):
            if params := [p for name, p in named if decays(name, p) == decay]:
                self.param_groups.append({"params": params, "lr": 0.0, "weight_decay": weight_decay if decay else 0.0})
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self.updates = 0
        self.moved: Callable[[nn.Parameter], None] = lambda parameter: None

    def allocate(self, updates: int) -> None:
        """Make the moments, zeros, as after `updates` updates: for the first step, or to read a state into them."""
        self.updates = updates
        self.state = {p: self._moments(name, p) for name, p in self.named}

    def _moments(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {moment: torch.zeros_like(local(parameter)) for moment in MOMENTS}

    @torch.no_grad()
    def step(self, scale: float | Tensor = 1.0) -> None:
        """Move all parameters by their gradients times `scale`; where it is NaN, nothing. The gradients may be changed.

        scale: a number, or a tensor of one, fp64. If it lies on a GPU, the host does not wait for it.
        """
        if not self.state:
            self.allocate(0)
        self.updates += 1
        scale = self._as_read(scale)
        if isinstance(scale, float) and math.isnan(scale):
            return
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None and local(p).numel()]
            pieces = [self._piece(p, local(p.grad)) for p in found]
            for some in self._in_turn(pieces):
                self._update([pieces[n] for n in some], group, scale)
                for n in some:
                    copy = copy_of(found[n])
                    if copy is not None and pieces[n].kernel is not None:
                        copy.written(found[n])
                    elif copy is not None:
                        copy.forget()
                    self.moved(found[n])

    def _as_read(self, scale: float | Tensor) -> float | Tensor:
        """The scale as the updates take it: a tensor on a GPU, elsewhere a number."""
        device = local(self.named[0][1]).device
        if device.type != "cuda":
            return float(scale)
        return scale if isinstance(scale, Tensor) else torch.full((), scale, dtype=torch.float64, device=device)

    def _in_turn(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """The numbers of the pieces that are updated together: those with a kernel of ours one by one, since they are
        large, and then all others."""
        alone = [[n] for n, piece in enumerate(pieces) if piece.kernel is not None]
        return [*alone, [n for n, piece in enumerate(pieces) if piece.kernel is None]]

    def _piece(self, parameter: nn.Parameter, gradient: Tensor) -> Piece:
        """A whole parameter. Moments in other forms than fp32 have kernels of their own."""
        value, moments = local(parameter), self.state[parameter]
        kernel = dispatch.find(dispatch.over_numbers("adamw", value))
        if kernel is None or not value.is_contiguous() or set(moments) != set(MOMENTS):
            return Piece(value, gradient, moments)
        copy = copy_of(parameter)
        return Piece(value, gradient, moments, kernel, None if copy is None else copy.tensor)

    def _update(self, pieces: Sequence[Piece], group: Mapping[str, Any], scale: float | Tensor) -> None:
        """Update the parameters of one group, each a whole piece."""
        self._adamw([piece for piece in pieces if not piece.widened], group, scale)
        for bucket in buckets((piece for piece in pieces if piece.widened), OPTIMIZER_PIECE):
            self._adamw(bucket, group, scale)

    def _adamw(self, pieces: Sequence[Piece], group: Mapping[str, Any], scale: float | Tensor) -> None:
        """The update of some pieces. Their moments lie on the parameters' device."""
        for piece in pieces:
            self._by_our_kernel(piece, group, scale)
        pieces = [piece for piece in pieces if piece.kernel is None]
        if not pieces:
            return
        device = pieces[0].value.device
        gradients = [piece.gradient.to(piece.value.dtype) for piece in pieces]
        divisor = nothing = None
        if isinstance(scale, Tensor):
            divisor, nothing = scale.reciprocal().float(), scale.isnan().float()
        elif scale != 1.0:
            torch._foreach_mul_(gradients, scale)
        # torch adds one to each counter before it reads it.
        counters = torch.full((len(pieces),), self.updates - 1.0, device=device).unbind()
        adamw(
            [piece.value for piece in pieces],
            gradients,
            [piece.moments["exp_avg"] for piece in pieces],
            [piece.moments["exp_avg_sq"] for piece in pieces],
            [],
            list(counters),
            foreach=False,
            fused=device.type == "cuda",
            grad_scale=divisor,
            found_inf=nothing,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=EPS,
            maximize=False,
        )

    def _by_our_kernel(self, piece: Piece, group: Mapping[str, Any], scale: float | Tensor) -> None:
        if piece.kernel is None:
            return
        how = {"lr": group["lr"], "weight_decay": group["weight_decay"], "updates": self.updates, "scale": scale}
        moments = (piece.moments[moment] for moment in MOMENTS)
        piece.kernel.load()(piece.value, piece.gradient, *moments, piece.copy, betas=BETAS, eps=EPS, **how)

    def zero_grad(self) -> None:
        """Free all gradients."""
        for _, p in self.named:
            p.grad = None
