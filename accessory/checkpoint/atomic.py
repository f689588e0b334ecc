"""Write folders that appear whole or not at all: each is filled as `<name>.partial`, synced, then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accessory.checkpoint.gguf_header import MAGIC
from accessory.checkpoint.hub import is_remote
from accessory.checkpoint.weight_files import PEFT_CONFIG, find_gguf, find_weights
from accessory.errors import CheckpointError

MARKER = ".writing"  # a file in every folder that is being written; it stays if the writer is killed

_BESIDE = len(".calibrating")  # the longest ending of a name that we make beside a destination


def refuse_overlap(src: Path, dst: Path) -> None:
    """Raise CheckpointError if `dst` is `src` or contains it, because replacing `dst` would then delete `src`."""
    source, target = Path(os.path.realpath(src)), Path(os.path.realpath(dst))
    if source == target:
        raise CheckpointError(f"{dst}: is the source itself; give another folder to write to")
    if target in source.parents:
        raise CheckpointError(f"{dst}: holds the source {src}; give another folder to write to")


def check_place(dst: Path) -> None:
    """Raise CheckpointError where no folder `dst` can be made: below a file, in a folder that is not ours, too long."""
    whole = Path(os.path.abspath(dst))
    above = next((folder for folder in whole.parents if os.path.lexists(folder)), whole)
    shown = above if dst.is_absolute() else os.path.relpath(above)
    if not above.is_dir():
        raise CheckpointError(f"{dst}: {shown} is a file and no folder; give another folder to write to")
    most = os.pathconf(above, "PC_NAME_MAX") - _BESIDE
    for name in whole.relative_to(above).parts:
        size = len(os.fsencode(name))
        if size > most:
            raise CheckpointError(
                f"{name[:20]}…: the name of the folder to write takes {size} bytes, at most {most} do"
            )
    if not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(f"{dst}: nothing may be written in {shown}; give another folder to write to")


def check_destination(dst: str | Path, overwrite: bool, sources: Iterable[str | Path] = ()) -> None:
    """Raise CheckpointError unless `dst` may be written. Commands call it first, before they read or fetch anything.

    It may if it is missing or empty, or, with `overwrite`, if it holds a checkpoint or an adapter. It may be none of
    the `sources`, and hold none of them; hf:// addresses do not count. It may lie inside one, as split.py has it.
    """
    dst = Path(dst)
    check_place(dst)
    for source in sources:
        if not is_remote(source):
            refuse_overlap(Path(source), dst)
    if not dst.exists():
        return
    if not dst.is_dir():
        raise CheckpointError(f"{dst}: is a file; give a folder to write to")
    if not any(dst.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{dst}: is not empty; give --overwrite to replace it, or another folder")
    if (dst / PEFT_CONFIG).is_file() or find_gguf(dst) is not None:
        return
    try:
        find_weights(dst)
    except CheckpointError as error:
        raise CheckpointError(f"{dst}: holds something else than a checkpoint and is not replaced") from error


def check_file(dst: Path, overwrite: bool, sources: Iterable[str | Path] = ()) -> None:
    """Raise CheckpointError unless a file `dst` may be written: it is missing or, with `overwrite`, a GGUF file.

    It may be none of the `sources`.
    """
    check_place(dst)
    for source in sources:
        if not is_remote(source):
            refuse_overlap(Path(source), dst)
    if not os.path.lexists(dst):
        return
    if not dst.is_file():
        raise CheckpointError(f"{dst}: is a folder; give a file to write to, or a folder of another name")
    if not overwrite:
        raise CheckpointError(f"{dst}: exists; give --overwrite to replace it, or another file")
    with open(dst, "rb") as handle:
        if handle.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{dst}: is no GGUF file and is not replaced")


@contextmanager
def new_file(dst: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a scratch folder. The file of `dst`'s name that is written there becomes `dst` when the block ends.

    It is deleted if the block raises. Leftovers of a killed run are removed first. Raises CheckpointError as
    `check_file` does, and if another process is writing to `dst`.
    """
    dst = Path(os.path.abspath(dst))
    check_file(dst, overwrite)
    with set_aside(dst, "partial") as folder:
        yield folder
        (folder / dst.name).replace(dst)
        sync_folder(dst.parent)


@contextmanager
def new_folder(dst: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to fill. It becomes `dst` when the block ends, and is deleted if the block raises.

    Leftovers of a killed run are removed first. Raises CheckpointError as `check_destination` does, and if another
    process is writing to `dst`.
    """
    dst = Path(os.path.abspath(dst))
    check_place(dst)
    partial, old = dst.with_name(dst.name + ".partial"), dst.with_name(dst.name + ".old")
    if old.exists() and not dst.exists():
        old.rename(dst)  # a run was killed between the two renames below
    check_destination(dst, overwrite)
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        _clear(partial)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(f"{partial}: cannot be made ({error.strerror})") from error
    try:
        with open(partial / MARKER, "w") as marker:  # marks the folder as ours; locked while its writer lives
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield partial
            (partial / MARKER).unlink()
            sync_folder(partial)
            if dst.exists() and any(dst.iterdir()):
                if old.exists():
                    shutil.rmtree(old)
                dst.rename(old)
            partial.rename(dst)
            sync_folder(dst.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if old.exists():
        shutil.rmtree(old)


@contextmanager
def set_aside(dst: Path, what: str) -> Iterator[Path]:
    """Yield a scratch folder `<name>.<what>` next to `dst`, for data needed until `dst` is written.

    It is deleted after the block. Leftovers of a killed run are removed first. Raises CheckpointError if another
    process is using the folder.
    """
    dst = Path(os.path.abspath(dst))
    aside = dst.with_name(f"{dst.name}.{what}")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        clear_aside(dst, what)
        aside.mkdir()
    except OSError as error:
        raise CheckpointError(f"{aside}: cannot be made ({error.strerror})") from error
    try:
        with open(aside / MARKER, "w") as marker:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def clear_aside(dst: Path, what: str) -> None:
    """Remove the `set_aside` folder of a killed run; CheckpointError if another process is using it."""
    _clear(dst.with_name(f"{dst.name}.{what}"))


def _clear(partial: Path) -> None:
    if not partial.exists():
        return
    try:
        with open(partial / MARKER) as marker:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError as error:
        if any(partial.iterdir()):
            raise CheckpointError(f"{partial}: is in the way and not ours; remove it or write elsewhere") from error
    except BlockingIOError as error:
        raise CheckpointError(f"{partial}: another process is writing there") from error
    shutil.rmtree(partial)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that new and renamed files survive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_free_space(folder: Path, needed: int) -> None:
    """Raise CheckpointError if the file system of `folder` has less than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(f"{folder}: {needed / 1e9:.2f} GB are needed, but {free / 1e9:.2f} GB are free")
