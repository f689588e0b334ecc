"""Ctrl-C that ends long work in an orderly way, so that what there is can still be shown: `first_ctrl_c`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def first_ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, while the context is open; the next one raises KeyboardInterrupt."""
    pressed, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def note(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        pressed.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
