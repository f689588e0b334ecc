"""Fused weights: parameters next to each other in memory, so that decoding needs one product for all of them.

Each product on a CPU starts a pool of threads. For one token that takes as long as a small product itself. A GPU starts
quicker, but a product of few rows does not keep all of it busy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from accessory.nn.linear import PackedWeight
from accessory.ops.quantized import Packed


class FusedWeights:
    """Turns weights into views of one tensor, which concatenates them along `dim`. Their names do not change.

    `tensor` is that tensor; of quantised weights, it is `Packed`, and each of its tensors concatenates theirs. It is
    None until `refresh` finds weights that can be fused: of one dtype or format, without gradients.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.tensor: Tensor | Packed | None = None

    def refresh(self, weights: Sequence[nn.Parameter | PackedWeight]) -> None:
        """Fuse the weights. Does it again where one was moved, cast or replaced. Values do not change."""
        before, self.tensor = self.tensor, None
        packed = [w for w in weights if isinstance(w, PackedWeight)]
        if not packed:
            own = before if isinstance(before, Tensor) else None
            self.tensor = self._fuse([w for w in weights if isinstance(w, nn.Parameter)], own)
        elif len(packed) == len(weights) and len({w.format for w in packed}) == 1:
            old = before.tensors() if isinstance(before, Packed) else {}
            pieces = {
                name: self._fuse([w.get_parameter(name) for w in packed], old.get(name))
                for name in packed[0].packed().tensors()
            }
            if all(piece is not None for piece in pieces.values()):
                self.tensor = Packed(packed[0].format, **pieces)  # type: ignore[arg-type]

    def _fuse(self, parameters: Sequence[nn.Parameter], before: Tensor | None) -> Tensor | None:
        """One tensor, of which the parameters become views: `before`, if they are its views; None: not possible."""
        if any(p.requires_grad or p.is_meta or type(p.data) is not Tensor for p in parameters):
            return None
        if before is not None and all(
            p.data_ptr() == part.data_ptr() and p.dtype == part.dtype
            for p, part in zip(parameters, self._parts(before, parameters), strict=True)
        ):
            return before
        if any(p.dtype != parameters[0].dtype for p in parameters):
            return None
        tensor = torch.cat([p.data for p in parameters], self.dim)
        for p, part in zip(parameters, self._parts(tensor, parameters), strict=True):
            p.data = part
        return tensor

    def _parts(self, tensor: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
        return tensor.split([p.shape[self.dim] for p in parameters], self.dim)
