"""Whether a run's images can be used, as far as their headers tell, before its first step: `broken_headers`.

Several threads read, since most of the time is spent waiting for a disk. An image of several items is read once. The
check takes bounded time; what is wrong with an image that it did not reach shows in the step that loads it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from accessory.data.images import MAX_PIXELS, read_header
from accessory.errors import InputError
from accessory.progress import progress_bar

log = logging.getLogger(__name__)

PATIENCE = 600.0  # seconds
_PIECE = 64  # images that a thread reads one after the other
_THREADS = 8


def broken_headers(
    paths: Iterable[str], *, max_pixels: int = MAX_PIXELS, progress: bool = False, patience: float = PATIENCE
) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) of each image that cannot be used, in order.

    A warning says how many images were not read within `patience` seconds. Raises MissingExtraError without Pillow.
    """
    unique = list(dict.fromkeys(paths))
    deadline = time.monotonic() + patience

    def look(piece: list[str]) -> tuple[list[tuple[str, str]], int]:
        found: list[tuple[str, str]] = []
        for number, path in enumerate(piece):
            if time.monotonic() > deadline:
                return found, number
            try:
                read_header(path, max_pixels=max_pixels)
            except InputError as error:
                found.append((path, str(error)))
        return found, len(piece)

    pieces = [unique[i : i + _PIECE] for i in range(0, len(unique), _PIECE)]
    unknown = 0
    with ThreadPoolExecutor(_THREADS) as pool, progress_bar(len(unique), "images", progress, unit=" headers") as shown:
        try:
            for piece, (found, looked) in zip(pieces, pool.map(look, pieces), strict=True):
                unknown += len(piece) - looked
                yield from found
                shown.update(len(piece))
        finally:
            pool.shutdown(cancel_futures=True)
    if unknown:
        log.warning(
            "images: the headers of %d of %d were not read within %.0f s; what is wrong with them shows when they are "
            "loaded",
            unknown,
            len(unique),
            patience,
        )
