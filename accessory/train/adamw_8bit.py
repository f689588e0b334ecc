"""AdamW with moments in 8 bits, rounded in blocks of 256 numbers (arXiv 2110.02861): bitsandbytes' kernels.

Blocks lie within rows, so that any cut of a tensor at whole blocks cuts the moments too. Tensors whose rows have no
whole blocks, norms, routers, biases and small tensors keep moments in fp32: `planner.moments.in_8_bits`.

A moment in 8 bits is two tensors: codes of the parameter's shape, and a scale for each block.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from accessory.errors import ConfigError, MissingExtraError, one_line
from accessory.limits import OPTIMIZER_PIECE
from accessory.parallel.local_shard import local
from accessory.planner.moments import BLOCK, in_8_bits, uneven_blocks
from accessory.train.adamw import BETAS, EPS, MOMENTS, AdamW, Piece

CODES = tuple(f"{moment}_8bit" for moment in MOMENTS)
SCALES = tuple(f"{moment}_scale" for moment in MOMENTS)


def functional() -> Any:
    """The module `bitsandbytes.functional`. MissingExtraError without the package."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of kernels for products that nothing here calls
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise MissingExtraError(
            "optimizer: adamw_8bit needs the package bitsandbytes: pip install 'mixtral-accessory[optim]' or pip "
            "install bitsandbytes"
        ) from error
    finally:
        log.setLevel(level)
    return bitsandbytes.functional


def require_8bit(device: torch.device | str) -> None:
    """MissingExtraError without bitsandbytes, ConfigError where it cannot make an update on `device`: it makes one."""
    functional()
    parameter = nn.Parameter(torch.ones(BLOCK, BLOCK, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = AdamW8bit([("weight", parameter)], 0.0)
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        moved = bool((parameter < 1.0).all())
    except (RuntimeError, NotImplementedError, AttributeError, OSError, ValueError) as error:
        raise _unusable(device, one_line(error)) from error
    if not moved:
        raise _unusable(device, "an update moved nothing")


def _unusable(device: torch.device | str, why: str) -> ConfigError:
    import bitsandbytes

    return ConfigError(
        f"optimizer: adamw_8bit cannot run on {device}: bitsandbytes {bitsandbytes.__version__} says: {why}; install a "
        "newer bitsandbytes, or give optimizer adamw"
    )


class AdamW8bit(AdamW):
    """AdamW with most moments in 8 bits.

    wholes: the shapes of the uncut parameters, by name; by default each is whole. Raises ConfigError where a rank's
    part of a parameter ends inside a block.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        weight_decay: float,
        wholes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__(named, weight_decay)
        self._wholes = wholes or {}
        for name, p in named:
            if in_8_bits(name, self._whole(name, p)) and local(p).shape[-1] % BLOCK:
                raise ConfigError(uneven_blocks(name, local(p).shape[-1]))

    def _whole(self, name: str, parameter: nn.Parameter) -> tuple[int, ...]:
        return self._wholes.get(name, tuple(parameter.shape))

    def _moments(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        if not in_8_bits(name, self._whole(name, parameter)):
            return super()._moments(name, parameter)
        like = local(parameter)
        codes = {key: torch.zeros_like(like, dtype=torch.uint8) for key in CODES}
        blocks = (*like.shape[:-1], like.shape[-1] // BLOCK)
        return codes | {key: torch.zeros(blocks, device=like.device) for key in SCALES}

    def _as_read(self, scale: float | Tensor) -> float | Tensor:
        """bitsandbytes takes a number, so the host waits for it."""
        return float(scale)

    def _update(self, pieces: Sequence[Piece], group: Mapping[str, Any], scale: float | Tensor) -> None:
        wide = [piece for piece in pieces if CODES[0] not in piece.moments]
        super()._update(wide, group, super()._as_read(scale))
        rounded = (piece for piece in pieces if CODES[0] in piece.moments)
        for piece in chain.from_iterable(piece.cut(OPTIMIZER_PIECE) for piece in rounded):
            self._adamw_8bit(piece, group, scale)

    def _adamw_8bit(self, piece: Piece, group: Mapping[str, Any], scale: float | Tensor) -> None:
        codes, sq_codes = (piece.moments[key] for key in CODES)
        scales, sq_scales = (piece.moments[key] for key in SCALES)
        signed, unsigned = self._values
        self._functional.optimizer_update_8bit_blockwise(
            "adam",
            piece.gradient.to(piece.value.dtype),
            piece.value,
            codes,
            sq_codes,
            BETAS[0],
            BETAS[1],
            0.0,  # of other optimisers: a third beta, and alpha
            0.0,
            EPS,
            self.updates,
            group["lr"],
            signed,
            unsigned,
            scales,
            sq_scales,
            group["weight_decay"],
            gnorm_scale=float(scale),
        )

    @cached_property
    def _functional(self) -> Any:
        return functional()

    @cached_property
    def _values(self) -> tuple[Tensor, Tensor]:
        """What the 256 codes of the two moments mean, as parts of their block's scale."""
        device = local(self.named[0][1]).device
        signed, unsigned = (self._functional.create_dynamic_map(signed=s).to(device) for s in (True, False))
        return signed, unsigned
