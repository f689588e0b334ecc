"""The ranks of one process group (`Ranks`), and all ranks of a run as data × model (`DeviceMesh`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from accessory.errors import AccessoryError, ConfigError, InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """A process group and this process's place in it."""

    group: Any  # torch.distributed.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any) -> Ranks:
        if not dist.is_initialized():
            raise ConfigError("mp_group: call torch.distributed.init_process_group before making groups and models")
        if not isinstance(group, dist.ProcessGroup):
            raise ConfigError(f"mp_group: got a {type(group).__name__}, but it must be a torch.distributed group")
        rank = dist.get_rank(group)
        if rank < 0:
            raise ConfigError("mp_group: this process does not belong to it; pass a group that holds this rank")
        return cls(group, rank, dist.get_world_size(group))

    @property
    def first(self) -> int:
        """The global rank of the group's first process, the one that decides."""
        return dist.get_global_rank(self.group, 0)


def broadcast_object(value: Any, ranks: Ranks | None) -> Any:
    """The first rank's Python object on every rank; what the others pass is ignored."""
    if ranks is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=ranks.first, group=ranks.group)
    return box[0]


@dataclass(frozen=True)
class DeviceMesh:
    """All ranks of a run, `data` × `model`. A model's parts lie on neighbouring ranks; None: a dimension of one."""

    data: Ranks | None = None
    model: Ranks | None = None
    fsdp_mesh: Any = None  # the data-parallel dimension, for FSDP2
    all: Ranks | None = None

    @classmethod
    def of(cls, ranks: Ranks | None, model_parallel_size: int, device_type: str) -> DeviceMesh:
        """ConfigError where the ranks do not divide into models of that size."""
        world = ranks.size if ranks is not None else 1
        if model_parallel_size < 1 or world % model_parallel_size:
            raise ConfigError(
                f"model_parallel_size: got {model_parallel_size}, but it must divide the number of ranks, {world}"
            )
        if world == 1:
            return cls()
        mesh = init_device_mesh(
            device_type, (world // model_parallel_size, model_parallel_size), mesh_dim_names=("data", "model")
        )
        data, model = (Ranks.of(mesh.get_group(name)) for name in ("data", "model"))
        return cls(data if data.size > 1 else None, model if model.size > 1 else None, mesh["data"], ranks)

    @property
    def data_rank(self) -> int:
        return self.data.rank if self.data else 0

    @property
    def data_size(self) -> int:
        return self.data.size if self.data else 1

    @property
    def model_rank(self) -> int:
        return self.model.rank if self.model else 0

    @property
    def model_size(self) -> int:
        return self.model.size if self.model else 1

    @property
    def first(self) -> bool:
        """Whether this is the one process that speaks and writes."""
        return self.data_rank == self.model_rank == 0

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """In place."""
        if self.data is not None:
            dist.all_reduce(tensor, group=self.data.group)
        return tensor

    def sum_over_all(self, tensor: Tensor) -> Tensor:
        """In place."""
        if self.all is not None:
            dist.all_reduce(tensor, group=self.all.group)
        return tensor

    def from_first(self, function: Callable[[], T]) -> T:
        """What `function` gives on the first process, on all; an error of the user's or the disk's is raised on all."""
        outcome: tuple[Any, AccessoryError | None] = (None, None)
        if self.first:
            try:
                outcome = (function(), None)
            except AccessoryError as error:
                outcome = (None, error)
            except OSError as error:  # as InputError: one process speaks for all
                where = f"{error.filename}: " if error.filename is not None else ""
                outcome = (None, InputError(f"{where}{error.strerror or error}"))
        value, failure = broadcast_object(outcome, self.all)
        if failure is not None:
            raise failure
        return value
