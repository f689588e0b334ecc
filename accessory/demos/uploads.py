"""The images that visitors upload: files in a folder of our own, each kept for as long as a visitor needs it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from pathlib import Path

LARGEST = "20mb"  # a photograph has fewer


class Uploads:
    """A folder that this user alone can read, gone when the page is closed or this process ends.

    Gradio names a file by its content: visitors who upload the same image share one.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="accessory-", ignore_cleanup_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = self._folder.name  # read while a page is built and when it is launched
        self._needed: dict[str, set[str]] = {}
        self._lock = threading.Lock()

    def need(self, visitor: str, *paths: str | None) -> None:
        """The visitor needs these and no others; what nobody needs any more is deleted."""
        with self._lock:
            before = self._needed.pop(visitor, set())
            if now := {path for path in paths if path is not None}:
                self._needed[visitor] = now
            for path in before.difference(*self._needed.values()):
                with contextlib.suppress(OSError):
                    Path(path).unlink()
                    Path(path).parent.rmdir()

    def close(self) -> None:
        self._folder.cleanup()
