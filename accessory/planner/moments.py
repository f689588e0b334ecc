"""Which moments an optimiser keeps in 8 bits, and the bytes that the moments of a trained tensor take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from accessory.errors import ConfigError
from accessory.planner.setup import Setup, Training
from accessory.planner.weights import TensorGroup, is_trained, rank_share, tensor_groups

BLOCK = 256  # numbers that share a scale
SMALLEST = 4096  # numbers of a tensor whose moments are in 8 bits; bitsandbytes' limit
_IN_FP32 = ("norm.weight", "bias", "_img")  # beside routers


def in_8_bits(name: str, shape: Sequence[int]) -> bool:
    """Whether adamw_8bit keeps the moments of a tensor in 8 bits, by its name and the shape of the uncut tensor.

    Only where each row is whole blocks. So it does not depend on how the tensor is cut, and every cut can read what
    another one wrote.
    """
    if len(shape) < 2 or name.endswith(_IN_FP32) or ".gate." in name:
        return False
    return shape[-1] % BLOCK == 0 and shape[-2] * shape[-1] >= SMALLEST


def uneven_blocks(name: str, columns: int) -> str:
    """The message for a cut that goes through a block."""
    return (
        f"optimizer: adamw_8bit rounds blocks of {BLOCK} numbers of a row, but a rank would hold {columns} numbers of "
        f"a row of {name}; give fewer ranks, or optimizer adamw"
    )


def check_blocks(setup: Setup) -> None:
    """ConfigError where model-parallel ranks would cut a tensor inside a block of adamw_8bit's moments."""
    task = setup.task
    if not isinstance(task, Training) or task.optimizer != "adamw_8bit":
        return
    whole = replace(setup, tp=1)
    for held, uncut in zip(tensor_groups(setup), tensor_groups(whole), strict=True):
        if is_trained(held, setup) and in_8_bits(uncut.name, (uncut.rows, uncut.columns)) and held.columns % BLOCK:
            raise ConfigError(uneven_blocks(held.name, held.columns))


def moment_bytes(group: TensorGroup, task: Training) -> int:
    """The bytes of a trained group's moments, wherever they lie."""
    if task.optimizer == "adamw_8bit" and in_8_bits(group.name, (group.rows, group.columns)):
        return 2 * group.numel + 2 * 4 * (group.numel // BLOCK)  # a code a number, and a scale a block
    return task.parameter.moments * group.numel


def held_moments(setup: Setup, task: Training) -> int:
    """The bytes of one rank's moments, wherever they lie."""
    trained = (group for group in tensor_groups(setup) if is_trained(group, setup))
    return sum(rank_share(group, moment_bytes(group, task), setup, task) for group in trained)


def offloads(setup: Setup, task: Training) -> bool:
    """Whether the moments lie in host memory and the rest does not."""
    return task.offload == "optimizer" and setup.device == "cuda"


def offloaded_bytes(setup: Setup) -> int:
    """The bytes of the moments that one rank keeps in host memory beside what its GPU holds."""
    task = setup.task
    return held_moments(setup, task) if isinstance(task, Training) and offloads(setup, task) else 0
