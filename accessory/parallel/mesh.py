"""The ranks of one process group (`Ranks`), and all ranks of a run as a mesh (`DeviceMesh`)."""

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
    """A process group, with this process's rank in it and its size."""

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
        """The global rank of the group's first process. The other processes follow its decisions."""
        return dist.get_global_rank(self.group, 0)


def broadcast_object(value: Any, ranks: Ranks | None) -> Any:
    """Send the first rank's Python object to every rank. The values of other ranks are ignored."""
    if ranks is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=ranks.first, group=ranks.group)
    return box[0]


def sum_over(tensor: Tensor, ranks: Ranks | None) -> Tensor:
    """Sum a tensor over ranks, in place."""
    if ranks is not None:
        dist.all_reduce(tensor, group=ranks.group)
    return tensor


@dataclass(frozen=True)
class DeviceMesh:
    """All ranks of a run, as `data` × `model`. Neighbouring ranks share one model. None: a dimension of size 1.

    `data` holds all ranks with the same part of the network. Parameters are sharded over them, and losses and gradients
    are sums over them. `context` holds those neighbours among them that share each row of a batch, so `data` is
    `replicas` × `context`. `experts` holds those neighbours among them that have each expert once together.
    """

    data: Ranks | None = None
    model: Ranks | None = None
    fsdp_mesh: Any = None  # the data-parallel dimension, for `sharded`
    all: Ranks | None = None
    context: Ranks | None = None
    experts: Ranks | None = None
    experts_mesh: Any = None  # the data-parallel ranks with the same experts, for `sharded`; None: there are no others

    @classmethod
    def of(
        cls,
        ranks: Ranks | None,
        model_parallel_size: int,
        device_type: str,
        *,
        context_parallel_size: int = 1,
        expert_parallel_size: int = 1,
    ) -> DeviceMesh:
        """The mesh of these ranks. ConfigError where the sizes do not divide their number."""
        world = ranks.size if ranks is not None else 1
        if model_parallel_size < 1 or world % model_parallel_size:
            raise ConfigError(
                f"model_parallel_size: got {model_parallel_size}, but it must divide the number of ranks, {world}"
            )
        data_size = world // model_parallel_size
        if context_parallel_size < 1 or data_size % context_parallel_size:
            raise ConfigError(
                f"context_parallel_size: got {context_parallel_size}, but context_parallel_size × model_parallel_size "
                f"= {context_parallel_size * model_parallel_size} must divide the number of ranks, {world}"
            )
        if expert_parallel_size < 1 or data_size % expert_parallel_size:
            raise ConfigError(
                f"expert_parallel_size: got {expert_parallel_size}, but it must divide the number of data-parallel "
                f"ranks, {data_size}"
            )
        if world == 1:
            return cls()
        mesh = init_device_mesh(device_type, (data_size, model_parallel_size), mesh_dim_names=("data", "model"))
        data, model = (Ranks.of(mesh.get_group(name)) for name in ("data", "model"))

        def neighbours(size: int) -> tuple[Ranks | None, Any]:
            """Groups of `size` data-parallel ranks, and the mesh of the ranks at the same place in all groups."""
            if size == 1:
                return None, None
            sizes, names = (data_size // size, size, model_parallel_size), ("groups", "neighbours", "model")
            grouped = init_device_mesh(device_type, sizes, mesh_dim_names=names)
            return Ranks.of(grouped.get_group("neighbours")), grouped["groups"] if size < data_size else None

        context, _ = neighbours(context_parallel_size)
        experts, experts_mesh = neighbours(expert_parallel_size)
        return cls(
            data if data.size > 1 else None,
            model if model.size > 1 else None,
            mesh["data"],
            ranks,
            context,
            experts,
            experts_mesh,
        )

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
    def context_rank(self) -> int:
        return self.context.rank if self.context else 0

    @property
    def context_size(self) -> int:
        return self.context.size if self.context else 1

    @property
    def replica(self) -> int:
        """Which rows this rank has, wholly or in part: those of replica 0 … `replicas` - 1."""
        return self.data_rank // self.context_size

    @property
    def replicas(self) -> int:
        """How many groups of ranks have rows of their own."""
        return self.data_size // self.context_size

    @property
    def size(self) -> int:
        return self.data_size * self.model_size

    @property
    def first(self) -> bool:
        """Whether this process prints and writes files for all."""
        return self.data_rank == self.model_rank == 0

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the data-parallel ranks, in place."""
        return sum_over(tensor, self.data)

    def sum_over_all(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        return sum_over(tensor, self.all)

    def from_first(self, function: Callable[[], T]) -> T:
        """Call `function` on the first process and return its result on all.

        An AccessoryError is raised on all processes. So is an OSError, as an InputError.
        """
        outcome: tuple[Any, AccessoryError | None] = (None, None)
        if self.first:
            try:
                outcome = (function(), None)
            except AccessoryError as error:
                outcome = (None, error)
            except OSError as error:  # as an InputError with a one-line message
                where = f"{error.filename}: " if error.filename is not None else ""
                outcome = (None, InputError(f"{where}{error.strerror or error}"))
        value, failure = broadcast_object(outcome, self.all)
        if failure is not None:
            raise failure
        return value
