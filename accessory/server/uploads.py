"""The images that visitors upload: files in a temporary folder, deleted once no visitor needs them."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from pathlib import Path

LARGEST = "20mb"  # photographs are smaller
_UNDER_WAY = 30.0  # seconds after a visitor left in which uploads and events of that visitor may still arrive


class Uploads:
    """A folder that only this user can read. It is deleted when the page is closed or this process ends.

    Gradio names a file by its content, so visitors who upload the same image share one file.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="accessory-", ignore_cleanup_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = self._folder.name  # Gradio reads it when it builds and launches a page
        self._needed: dict[str, set[str]] = {}
        self._left: dict[str, float] = {}
        self._lock = threading.Lock()

    def need(self, visitor: str, *paths: str | None) -> None:
        """Note that the visitor needs these files and no others. Delete files that nobody needs any more. A visitor who
        has just left needs nothing, even if an event arrives late."""
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
        """Note that the visitor's page is closed or cannot be reached. Its last uploads may not have been reported, so
        all files that nobody needs are deleted a moment later."""
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
                    # A newer file may belong to another visitor whose event has not arrived yet.
                    if path.parts[-2:] not in needed and time.time() - path.stat().st_mtime >= _UNDER_WAY / 2:
                        path.unlink()
                        path.parent.rmdir()

    def close(self) -> None:
        self._folder.cleanup()
