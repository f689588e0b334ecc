"""How a rank ends: with the process that started it, within some seconds, or at once after it has spoken.

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

# Seconds that ranks which fail leave to the first one: the launcher must not end it before it has spoken.
FIRST_SPEAKS = 2.0


def watch_torchrun() -> Callable[[], bool]:
    """A question to ask from time to time: is the torchrun gone that started this process?

    Torchrun that was killed cannot end its ranks, which are in sessions of their own. False under any other launcher.
    """
    launcher = os.getppid()
    return lambda: "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != launcher


def end_with_torchrun(rank: int) -> None:
    """End this process when torchrun is gone: it would write into a folder that a new run has begun with."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_when, args=(watch_torchrun(), rank), daemon=True).start()


def _end_when(gone: Callable[[], bool], rank: int) -> NoReturn:
    while not gone():
        time.sleep(1)
    if not rank:
        print("accessory: error: torchrun is gone", file=sys.stderr, flush=True)
    os._exit(1)


def end_with_driver() -> None:
    """End this process when its standard input does, which the death of the driving process brings about."""

    def read() -> NoReturn:
        while sys.stdin.read(1):
            pass
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()


def end_within(seconds: float) -> None:
    """Whatever hangs from here on (a rank that is gone, a connection held open) does not hold this process longer."""

    def end() -> NoReturn:
        time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def leave(status: int) -> NoReturn:
    """End at once, after everything has been said.

    An ordinary exit would take process groups down, which waits for ranks that are dead, or aborts. And gloo now and
    then aborts while an interpreter ends.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
