"""Write a mixture as one GGUF file that llama.cpp runs, with its tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from accessory.checkpoint.atomic import check_destination, check_file
from accessory.checkpoint.folder import Checkpoint
from accessory.checkpoint.gguf_writer import FILE_NAME, check_gguf, plan_gguf
from accessory.checkpoint.hub import is_remote
from accessory.checkpoint.save import write_folder
from accessory.convert.gguf_vocabulary import vocabulary
from accessory.errors import CheckpointError, ConfigError

GGUFType = Literal["f16", "bf16", "q8_0"]
GGUF_TYPES: tuple[GGUFType, ...] = get_args(GGUFType)


def check_gguf_destination(dst: str | Path, type: str | None, overwrite: bool, sources: list[str | Path]) -> None:
    """Check what can be checked before the source is opened: type, package, destination.

    Raises ConfigError, MissingExtraError and CheckpointError.
    """
    if type not in (None, *GGUF_TYPES):
        raise ConfigError(f"type: got {type!r}, but it must be one of {', '.join(GGUF_TYPES)}")
    check_gguf()
    if _is_file(dst):
        check_file(Path(dst), overwrite, sources)
    else:
        check_destination(dst, overwrite, sources)


def write_gguf(
    dst: str | Path,
    source: Checkpoint,
    tokenizer: Path,
    *,
    type: GGUFType | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> None:
    """Write `source` to `dst`, a file if its name ends in .gguf, otherwise a folder with a model.gguf.

    `tokenizer`: the folder that holds it. `type`: of all matrices but the routers, which are fp32 as the norms are; by
    default bf16 if the source is, otherwise f16.

    Raises CheckpointError for a source that is quantised or takes images, one without a tokenizer that llama.cpp
    knows, and as `write_checkpoint` does; ConfigError for sizes that q8_0 cannot have.
    """
    if source.quant is not None or (source.gguf is not None and source.gguf.quantized):
        how = source.quant or (source.gguf and source.gguf.kind)
        raise CheckpointError(f"{source.path}: is quantised ({how}); give the folder that it was made from")
    if source.llama_type.image_views:
        raise CheckpointError(
            f"{source.path}: takes images, for which llama.cpp has no such network; gguf cannot hold it"
        )
    kind = (type or ("bf16" if source.dtype_name == "bfloat16" else "f16")).upper()
    name = Path(dst).name if _is_file(dst) else FILE_NAME
    metadata = {"general.name": _name(source), **vocabulary(tokenizer, source.args.vocab_size)}
    plan, tensors = plan_gguf(name, source.tensors, source.args, kind, metadata)
    plan.is_file = _is_file(dst)
    write_folder(dst, tensors, plan, overwrite=overwrite, verify=verify, progress=progress)


def _name(source: Checkpoint) -> str:
    if source.gguf is not None:
        return str(source.gguf.metadata.get("general.name", source.path.stem))
    if is_remote(source.name):  # its folder is named by a revision
        return source.name.partition("@")[0].rstrip("/").rpartition("/")[2]
    return source.path.resolve().name


def _is_file(dst: str | Path) -> bool:
    return Path(dst).suffix == ".gguf"
