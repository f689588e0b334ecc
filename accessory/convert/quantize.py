"""`accessory quantize`: read a checkpoint of any layout and write a quantised folder.

The folder loads in both implementations, on any number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from accessory.checkpoint.atomic import check_destination, check_free_space, clear_aside, refuse_overlap, set_aside
from accessory.checkpoint.files import read_safetensors
from accessory.checkpoint.folder import open_checkpoint
from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.packed import Quantized, Quantizing
from accessory.checkpoint.quantized_names import declaration
from accessory.checkpoint.save import write_folder
from accessory.checkpoint.writers import FilePlan, FolderPlan, Slot
from accessory.config import LlamaType, ModelArgs
from accessory.convert.calibrate import CALIBRATED, Calibration, Reached
from accessory.errors import ConfigError
from accessory.formats import FORMATS, Quant, check_rows

log = logging.getLogger(__name__)

FILE_BYTES = 5 * 10**9  # the largest size of a file
ASIDE = "calibrating"  # ending of the scratch folder, next to the folder to write


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    quant: Quant | None,
    *,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = True,
    config_files: Sequence[str | Path] = (),
    search: bool = True,
    calibrate: Tensor | None = None,
    allow_unreached: bool = False,
    device: torch.device | str = "cpu",
) -> Reached | None:
    """Write the checkpoint in `src` (a folder or hf:// address of any layout) to `dst`, quantised as `quant` says.

    Parts that `quant` leaves out stay as they are in `src`. Weights are read and quantised some rows at a time. `dst`
    appears whole or not at all, and with `verify` only after it was read back and compared.

    Quantising runs on `device`. int4's scales are searched for the smallest error unless `search` is False.
    `calibrate`: the token ids (B, T) of a text; int4 and int8 numbers are then chosen for the inputs that the text
    sends through the network. The tokens that reached each expert are returned and written to calibration.json.
    `allow_unreached`: quantise experts that no token reached without calibration.

    Raises CheckpointError and ConfigError as reading, writing and calibrating do, and ConfigError for a `src` that is
    already quantised and for rows that are not whole groups.
    """
    if quant is None:
        raise ConfigError(f"quant: nothing is to be quantised; give one of {', '.join(FORMATS)}")
    check_destination(dst, overwrite, [src])
    clear_aside(Path(dst), ASIDE)
    source = open_checkpoint(src, config_files)
    refuse_overlap(source.path, Path(dst))
    if source.quant is not None:
        raise ConfigError(
            f"{source.path}: is quantised already ({source.quant}); give the folder that it was made from"
        )
    tensors = quantized_tensors(source.tensors, quant, search, device)
    log.info("%s (%s, %.2f GB) → %s (%s)", source.path, source.layout, source.nbytes / 1e9, dst, quant)
    reached: Reached | None = None
    with ExitStack() as stack:
        if calibrate is not None:
            calibration = Calibration(
                source.tensors, source.args, quant, calibrate, device=device, allow_unreached=allow_unreached
            )
            tensors |= stack.enter_context(_set_aside(calibration, tensors, Path(dst), progress))
            reached = calibration.reached
        plan = plan_quantized(tensors, source.args, source.llama_type, quant)
        if reached is not None:
            plan.documents["calibration.json"] = reached.to_dict()
        write_folder(
            dst,
            tensors,
            plan,
            resources=source.resources,
            overwrite=overwrite,
            verify=verify,
            progress=progress,
        )
    return reached


@contextmanager
def _set_aside(
    calibration: Calibration, tensors: Mapping[str, Lazy], dst: Path, progress: bool
) -> Iterator[dict[str, Lazy]]:
    """Yield the calibrated weights as lazy tensors in a scratch folder next to `dst`.

    Each weight is written to a file of its own as soon as it is chosen. So memory holds the weights of one layer, and
    `dst` is written like any other folder.
    """
    wanted = {n: t for n, t in tensors.items() if isinstance(t, Quantizing) and t.format in CALIBRATED}
    with set_aside(dst, ASIDE) as scratch:
        check_free_space(scratch, 2 * sum(p.nbytes for t in wanted.values() for p in t.pieces.values()))
        out: dict[str, Lazy] = {}
        for name, packed in calibration.weights(progress):
            save_file(packed.tensors(), scratch / name)
            out[name] = Quantized(packed.format, read_safetensors(scratch / name), wanted[name].dtype)
        yield out


def quantized_tensors(
    tensors: Mapping[str, Lazy], quant: Quant, search: bool = True, device: torch.device | str = "cpu"
) -> dict[str, Lazy]:
    """Replace the tensors that `quant` names by ones that are quantised when they are written.

    ConfigError naming a weight whose rows are not whole groups.
    """
    dtype = tensors["tok_embeddings.weight"].dtype  # the dtype that readers of the folder get
    out: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        format = quant.format_of(name)
        if format is None:
            out[name] = tensor
            continue
        check_rows(name, format, tensor.shape[1])
        out[name] = Quantizing(tensor, format, dtype, search, device)
    return out


def plan_quantized(
    tensors: Mapping[str, Lazy], args: ModelArgs, llama_type: LlamaType, quant: Quant, file_bytes: int = FILE_BYTES
) -> FolderPlan:
    """Plan the folder: safetensors files of at most `file_bytes`, an index if needed, config.json and meta.json."""
    groups: list[dict[str, Slot]] = [{}]
    size = total = 0
    for canonical, tensor in tensors.items():
        slots = {canonical: Slot(tensor.shape, tensor.dtype, [(canonical, _whole)])}
        if isinstance(tensor, Quantizing | Quantized):
            slots = {
                f"{canonical}.{piece}": Slot(lazy.shape, lazy.dtype, [(canonical, partial(_piece, piece=piece))])
                for piece, lazy in tensor.pieces.items()
            }
        nbytes = FilePlan("", slots).nbytes
        if size and size + nbytes > file_bytes:
            groups.append({})
            size = 0
        groups[-1].update(slots)
        size, total = size + nbytes, total + nbytes
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    files = [FilePlan(name, group) for name, group in zip(names, groups, strict=True)]
    documents = {
        "config.json": {**args.to_dict(), "quantization": declaration(quant)},
        "meta.json": {"llama_type": str(llama_type)},
    }
    if len(files) == 1:
        files[0].name = "model.safetensors"
    else:
        weight_map = {name: file.name for file in files for name in file.slots}
        documents["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return FolderPlan(files, documents)


def _whole(tensor: Lazy) -> Lazy:
    return tensor


def _piece(tensor: Lazy, piece: str) -> Lazy:
    assert isinstance(tensor, Quantized | Quantizing), "only these have pieces"
    return tensor.pieces[piece]
