"""Ends a rank: together with the process that started it, within some seconds, or at once after its last message.

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

# Seconds that a failed rank waits for the first rank to print its error: the launcher ends all ranks once one is gone.
FIRST_SPEAKS = 2.0


def watch_torchrun() -> Callable[[], bool]:
    """Return a function that tells whether the torchrun that started this process is gone. Call it now and then.

    A torchrun that was killed cannot end its ranks, because they are in other sessions. The function returns False
    under any other launcher.
    """
    launcher = os.getppid()
    return lambda: "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != launcher


def end_with_torchrun(rank: int) -> None:
    """End this process when torchrun is gone. Otherwise it would write into a folder that a new run already uses."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_when, args=(watch_torchrun(), rank), daemon=True).start()


def _end_when(gone: Callable[[], bool], rank: int) -> NoReturn:
    while not gone():
        time.sleep(1)
    if not rank:
        print("accessory: error: torchrun is gone", file=sys.stderr, flush=True)
    os._exit(1)


def end_with_driver() -> None:
    """End this process when its standard input ends. That happens when the driver dies."""

    def read() -> NoReturn:
        while sys.stdin.read(1):
            pass
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()


def end_within(seconds: float) -> None:
    """End this process after `seconds`, even if something hangs (a rank that is gone, an open connection)."""

    def end() -> NoReturn:
        time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def leave(status: int) -> NoReturn:
    """End the process at once, after flushing its output.

    An ordinary exit would destroy process groups, and that waits for dead ranks or aborts. Also, gloo sometimes aborts
    while the interpreter ends.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
