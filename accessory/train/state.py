"""A run's state on disk: trained parameters, the optimiser's moments, and where in the data the run stands.

`<run>/states/step-00000020/` holds safetensors that torch.distributed.checkpoint wrote, one set a rank, each tensor
with its place in the whole, and `state.json`. Names are the network's own, sizes those of the uncut tensors: so any
number of ranks, in either implementation, reads what any other number wrote. A state appears whole or not at all.

Legend: a tensor is `<what>.<parameter>`, what being "model", "exp_avg" or "exp_avg_sq"; or, of a moment in 8 bits,
"exp_avg_8bit", its codes, and "exp_avg_scale", a scale for each block of a row; and the same of "exp_avg_sq".
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from accessory.checkpoint.atomic import MARKER, new_folder, sync_folder
from accessory.checkpoint.files import read_safetensors, safetensors_metadata
from accessory.checkpoint.lazy import Lazy, concat
from accessory.checkpoint.load import part_of
from accessory.config import read_json
from accessory.errors import CheckpointError
from accessory.parallel.local_shard import LocalShard, local_parameters, shard_like
from accessory.train.trainer import Trainer

STATES = "states"  # the folder of a run that holds its states
_FILE_BYTES = 2 * 10**9  # a rank keeps about this much in host memory while it writes
_STEP = re.compile(r"step-(\d{8})")
_DESCRIPTION = "state.json"
FORMAT = 1


@dataclass(frozen=True)
class StateInfo:
    """What `state.json` says beside the tensors."""

    step: int
    values: dict[str, Any]  # what `train.resume` saves and reads
    folder: Path


class _Planner(dcp.DefaultSavePlanner):
    """Tells torch.distributed.checkpoint which box of a whole tensor each local tensor is."""

    def __init__(self, shards: Mapping[str, LocalShard]) -> None:
        super().__init__(flatten_state_dict=False)  # names are flat already
        self.shards = shards

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, shard) for name, shard in self.shards.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.shards[index.fqn].tensor


def _write_item(name: str, shard: LocalShard) -> WriteItem:
    offsets = torch.Size(shard.offsets)
    return WriteItem(
        index=MetadataIndex(name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=shard.tensor.shape),
            properties=TensorProperties.create_from_tensor(shard.tensor),
            size=torch.Size(shard.whole),
        ),
    )


def local_state(trainer: Trainer) -> dict[str, LocalShard]:
    """This rank's boxes of trained parameters and moments; empty ones are left out."""
    parameters = dict(trainer.named)
    out = {}
    for shard in local_parameters(trainer.decoder):
        if shard.name not in parameters or not shard.tensor.numel():
            continue
        out[f"model.{shard.name}"] = shard
        for moment, tensor in trainer.optimizer.state.get(parameters[shard.name], {}).items():
            out[f"{moment}.{shard.name}"] = shard_like(shard, tensor)
    return out


def save_state(trainer: Trainer, folder: Path, step: int, values: Mapping[str, Any], keep: int) -> Path:
    """Write `folder`/step-…, then remove all but the last `keep` states. Every rank calls it.

    Raises CheckpointError on all ranks where a rank cannot write. The states before are then still there.
    """
    mesh, target = trainer.mesh, folder / f"step-{step:08d}"
    if not trainer.optimizer.state:
        trainer.optimizer.allocate(0)  # no step was made yet, and a state without moments could not be loaded
    shards = local_state(trainer)

    with ExitStack() as stack:
        place = mesh.from_first(lambda: stack.enter_context(new_folder(target)))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
                dcp.save(
                    {name: shard.tensor for name, shard in shards.items()},
                    storage_writer=dcp.HuggingFaceStorageWriter(
                        str(place), fqn_to_index_mapping=_files(shards), save_distributed=True
                    ),
                    planner=_Planner(shards),
                    no_dist=mesh.all is None,
                )
        except (dcp.api.CheckpointException, OSError) as error:
            raise CheckpointError(f"{target}: cannot be written ({_reason(error)})") from error

        def finish() -> None:
            files = {file.name: file.stat().st_size for file in sorted(place.glob("*.safetensors"))}
            with open(place / _DESCRIPTION, "w", encoding="utf-8") as handle:
                json.dump({"format": FORMAT, "step": step, "files": files, **values}, handle, indent=1)
                handle.flush()
                os.fsync(handle.fileno())
            stack.close()
            for old in complete_states(folder)[: -keep or None]:
                _drop(old)

        mesh.from_first(finish)
    return target


def _files(shards: Mapping[str, LocalShard]) -> dict[str, int]:
    """The number of the file that each of a rank's tensors goes to. No file grows large."""
    files, number, size = {}, 1, 0
    for name, shard in shards.items():
        nbytes = shard.tensor.numel() * shard.tensor.element_size()
        if size and size + nbytes > _FILE_BYTES:
            number, size = number + 1, 0
        files[name] = number
        size += nbytes
    return files


def _reason(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException):
        failures = error.failures
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {cause}"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _drop(state: Path) -> None:
    (state / _DESCRIPTION).unlink(missing_ok=True)  # first: a half-removed state is no state
    shutil.rmtree(state)


def complete_states(folder: Path) -> list[Path]:
    """The states of a run, oldest first; unfinished and half-removed ones do not count."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _STEP.fullmatch(p.name) and (p / _DESCRIPTION).is_file()]
    return sorted(p for p in found if not (p / MARKER).exists())


def clean_states(folder: Path, later_than: int) -> None:
    """Remove half-written and half-removed states of a killed run, and those of steps that will be made again."""
    if not folder.is_dir():
        return
    for state in complete_states(folder):
        if read_state_info(state, check=False).step > later_than:
            _drop(state)
    whole = set(complete_states(folder))
    for path in folder.iterdir():
        if path not in whole and _STEP.fullmatch(path.name.split(".")[0]) and path.is_dir():
            shutil.rmtree(path)
    sync_folder(folder)


def read_state_info(state: Path, check: bool = True) -> StateInfo:
    """Read `state.json` of one state.

    Raises CheckpointError where the folder is no state or of an unknown format, and, with `check`, where it is damaged.
    """
    if not (state / _DESCRIPTION).is_file():
        raise CheckpointError(f"{state}: holds no {_DESCRIPTION}; give a folder step-… of a run's states")
    values = read_json(state / _DESCRIPTION)
    if values.get("format") != FORMAT or not isinstance(values.get("step"), int):
        raise CheckpointError(f"{state / _DESCRIPTION}: format {values.get('format')!r} is not known here")
    for name, size in values["files"].items() if check else ():
        found = (state / name).stat().st_size if (state / name).is_file() else None
        if found != size:
            told = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
            raise CheckpointError(f"{state / name}: {told}; remove this state to go on from an earlier one")
    return StateInfo(values["step"], values, state)


def state_tensors(state: Path) -> dict[str, Lazy]:
    """Every tensor of a state, whole. It is put together lazily from the boxes that the ranks wrote."""
    boxes: dict[str, list[tuple[tuple[int, ...], Lazy]]] = {}
    for file in sorted(state.glob("*.safetensors")):
        tensors = read_safetensors(file)
        info = json.loads(safetensors_metadata(file).get("DCP_SHARDING_INFO", "{}"))
        for name, tensor in tensors.items():
            boxes.setdefault(name, []).append((tuple(info[name]["saved_offsets"]), tensor))
    return {name: _assemble(name, found) for name, found in boxes.items()}


def _assemble(name: str, boxes: list[tuple[tuple[int, ...], Lazy]]) -> Lazy:
    if len(boxes) == 1:
        return boxes[0][1]
    for dim in range(len(boxes[0][0])):
        starts = sorted({offsets[dim] for offsets, _ in boxes})
        if len(starts) > 1:
            rows = [[box for box in boxes if box[0][dim] == start] for start in starts]
            return concat([_assemble(name, row) for row in rows], dim)
    raise CheckpointError(f"{name}: is there twice; the state is damaged")


def load_state(trainer: Trainer, state: Path) -> None:
    """Fill parameters and moments from a state that any number of ranks wrote, in either implementation.

    Raises CheckpointError, before anything is changed, for a tensor that is missing, unknown or of another shape.
    """
    tensors = state_tensors(state)
    info = read_state_info(state)
    trainer.optimizer.allocate(int(info.values["updates"]))
    wanted = local_state(trainer)
    for name, shard in wanted.items():
        if name not in tensors:
            raise CheckpointError(f"{state}: holds no {name}: it is of a run that trained something else")
        if tensors[name].shape != shard.whole:
            raise CheckpointError(f"{state}: {name} is {tensors[name].shape}, here {shard.whole}: another model's")
    trained = {f"model.{name}" for name, _ in trainer.named}
    extra = [n for n in tensors if n.startswith("model.") and n not in trained]
    if extra:
        raise CheckpointError(f"{state}: holds {extra[0]}, which is not trained here")
    with torch.no_grad():
        for name, shard in wanted.items():
            part_of(tensors[name], shard).copy_to(shard.tensor)


def trained_tensors(state: Path) -> Iterator[tuple[str, Lazy]]:
    """The trained parameters of a state by their names in the network."""
    for name, tensor in state_tensors(state).items():
        if name.startswith("model."):
            yield name.removeprefix("model."), tensor
