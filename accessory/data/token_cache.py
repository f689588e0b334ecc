"""Encoded files kept on disk, so that a run begins at once and the ranks of a machine share one copy of the ids.

An encoded file is kept as a folder of .npy arrays. The folder's name holds a digest of everything that the contents
depend on. It appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from dataclasses import fields
from pathlib import Path

import numpy as np

from accessory.data.encoding import Encoded, Encoding
from accessory.data.records import Source
from accessory.errors import InputError

log = logging.getLogger(__name__)

FOLDER = ".accessory-cache"
_IMAGES = "images.json"
_WRITTEN = 4  # the version of the format: raise it when an item becomes other ids and _PROBE does not show it
_DEAD = 86400  # seconds after which an unfinished folder is a dead writer's
_ARRAYS = tuple(f.name for f in fields(Encoded) if f.name != "images")
# A dialogue that shows everything a template does. Its ids are in the digest, so templates need no version number.
_PROBE = [
    {"role": "user", "content": " Is it \n1? "},
    {"role": "assistant", "content": "No: 2."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": " 3\n"},
]


def cache_folder(source: Source, how: Encoding, selection: str, folder: Path | None = None) -> Path:
    """The folder that keeps the encoded file, inside `folder` or beside the file. selection: which items it holds."""
    digest = hashlib.sha256()
    for path in (source.path, how.tokenizer.path):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    tokenizer = how.tokenizer
    try:
        probe = how.template.encode(_PROBE, tokenizer)
    except InputError:
        probe = ([], [])
    parts = [
        how.template.name, tokenizer.chat_template, probe, how.dialog, source.preprocess, source.prompt_type, selection,
        tokenizer.add_bos, tokenizer.bos_id, tokenizer.eos_id, sorted(tokenizer.special_tokens.items()), _ARRAYS,
        _WRITTEN,
    ]  # fmt: skip
    digest.update(json.dumps(parts).encode())
    return (folder or source.path.parent / FOLDER) / f"{source.path.name}-{digest.hexdigest()[:24]}"


def load(folder: Path) -> Encoded | None:
    """The encoded file in `folder`, mapped into memory; None where there is none that can be read."""
    try:
        images = json.loads((folder / _IMAGES).read_text(encoding="utf-8"))
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
    except (OSError, ValueError):
        return None
    return Encoded(**arrays, images={int(item): path for item, path in images.items()})


def store(encoded: Encoded, folder: Path) -> bool:
    """Write an encoded file into `folder`; returns whether that worked.

    A folder that cannot be written only makes the next run slower, so it is a warning.
    """
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob("*.partial"):  # left by writers that were killed
            if left.stat().st_mtime < time.time() - _DEAD:
                shutil.rmtree(left, ignore_errors=True)
        for name in (*(f"{name}.npy" for name in _ARRAYS), _IMAGES):
            with open(aside / name, "wb") as file:
                if name == _IMAGES:
                    file.write(json.dumps(encoded.images).encode())
                else:
                    np.save(file, getattr(encoded, name.removesuffix(".npy")), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():  # another process was faster, or the folder cannot be read
            shutil.rmtree(folder)
        aside.rename(folder)
    except OSError as error:
        log.warning("cache_ann_on_disk: %s cannot be written (%s), so nothing is kept", folder, error.strerror)
        return False
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return True
