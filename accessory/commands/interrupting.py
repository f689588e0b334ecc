"""Ctrl-C: kept where Python loses it (`kept_interrupts`), and as the orderly end of long work (`first_ctrl_c`).

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

AGAIN = 0.05  # seconds after which a KeyboardInterrupt that may be lost is raised again


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


@contextmanager
def kept_interrupts() -> Iterator[None]:
    """While the context is open, Ctrl-C ends it with KeyboardInterrupt, also where Python loses that exception.

    Python drops every exception that is raised inside a destructor, or in a callback of the garbage collector, and
    tells `sys.unraisablehook`. Inside an import, modules in C (numpy, torch) go on without what they could not import,
    or raise another error in its place. A command that loads a model passes through many of these.
    """
    lost = _LostInterrupt()
    hook, handler = sys.unraisablehook, signal.getsignal(signal.SIGINT)

    def dropped(found: Any) -> None:
        if found.exc_type is KeyboardInterrupt:
            lost.raise_again()
        else:
            hook(found)

    def interrupt(_number: int, frame: FrameType | None) -> None:
        if _in_an_import(frame):
            lost.raise_again()
        raise KeyboardInterrupt

    ours = handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    sys.unraisablehook = dropped
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception:
        if lost.forget():
            raise KeyboardInterrupt from None
        raise
    else:
        if lost.forget():
            raise KeyboardInterrupt
    finally:
        lost.forget()
        sys.unraisablehook = hook
        if ours:
            signal.signal(signal.SIGINT, handler)
        # Python notes where an interrupt came out of exec("…"), as in a dataclass that is made. Then `python -m
        # accessory` would end by the signal instead of with 130. The next text that is evaluated takes the note away.
        eval("None")


class _LostInterrupt:
    """Sends this process Ctrl-C again after a moment, unless it is forgotten before."""

    def __init__(self) -> None:
        self._waiting: object | None = None

    def raise_again(self) -> None:
        self._waiting = this = object()

        def send() -> None:
            time.sleep(AGAIN)
            while self._waiting is this and _is_heard(main):
                time.sleep(AGAIN)
            if self._waiting is this:
                self._waiting = None
                signal.pthread_kill(main, signal.SIGINT)

        main = threading.main_thread().ident or 0
        _thread.start_new_thread(send, ())  # threading's lock may be held by what a signal's handler has interrupted

    def forget(self) -> bool:
        """Returns whether Ctrl-C was still to come."""
        waiting, self._waiting = self._waiting, None
        return waiting is not None


def _is_heard(thread: int) -> bool:
    """Whether a thread is in an `except` or `finally` of a KeyboardInterrupt, where it tidies up."""
    found: Any = sys._current_exceptions().get(thread)  # before Python 3.12 a tuple of type, exception and traceback
    return isinstance(found[1] if isinstance(found, tuple) else found, KeyboardInterrupt)


def _in_an_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False
