"""The images that visitors upload: files in a folder of our own, each kept for as long as a visitor needs it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from pathlib import Path

LARGEST = "20mb"  # a photograph has fewer
_UNDER_WAY = 30.0  # seconds in which what a visitor set going before leaving may still arrive


class Uploads:
    """A folder that this user alone can read, gone when the page is closed or this process ends.

    Gradio names a file by its content: visitors who upload the same image share one.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="accessory-", ignore_cleanup_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = self._folder.name  # read while a page is built and when it is launched
        self._needed: dict[str, set[str]] = {}
        self._left: dict[str, float] = {}
        self._lock = threading.Lock()

    def need(self, visitor: str, *paths: str | None) -> None:
        """The visitor needs these and no others; what nobody needs any more is deleted. A visitor who has just left
        needs nothing, whatever arrives late."""
        with self._lock:
            now = {path for path in paths if path is not None}
            before = self._needed.pop(visitor, set()) | now
            if now and time.monotonic() - self._left.get(visitor, -_UNDER_WAY) >= _UNDER_WAY:
                self._needed[visitor] = now
            for path in before.difference(*self._needed.values()):
                with contextlib.suppress(OSError):
                    Path(path).unlink()
                    Path(path).parent.rmdir()

    def leave(self, visitor: str) -> None:
        """The visitor's page is closed, or cannot be reached. It may have uploaded what it never told of: a moment
        later, everything goes that nobody needs."""
        now = time.monotonic()
        with self._lock:
            self._left = {who: when for who, when in self._left.items() if now - when < _UNDER_WAY} | {visitor: now}
        self.need(visitor)
        later = threading.Timer(_UNDER_WAY, self._sweep)
        later.daemon = True
        later.start()

    def _sweep(self) -> None:
        with self._lock:
            needed = {Path(path).parts[-2:] for paths in self._needed.values() for path in paths}
            for path in Path(self._folder.name).glob("*/*"):
                with contextlib.suppress(OSError):
                    # A younger one may be another visitor's, who is about to tell of it.
                    if path.parts[-2:] not in needed and time.time() - path.stat().st_mtime >= _UNDER_WAY / 2:
                        path.unlink()
                        path.parent.rmdir()

    def close(self) -> None:
        self._folder.cleanup()
