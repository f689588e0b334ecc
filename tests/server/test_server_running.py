"""What holds in a process while it serves, and no longer."""

import gc
import os
import signal
import sys

from fastapi import FastAPI

from accessory.server.running import SWITCH_SECONDS, listen, run


def test_collections_pass_over_nothing_that_was_there_before():
    found, before = [], sys.getswitchinterval()

    def ready():
        found.append((gc.get_freeze_count(), sys.getswitchinterval()))
        os.kill(os.getpid(), signal.SIGTERM)

    with listen("127.0.0.1", 0) as listening:
        run(FastAPI(), listening, patience=1.0, ready=ready)
    ((frozen, interval),) = found
    assert frozen > 10_000
    assert abs(interval - SWITCH_SECONDS) < 1e-6
    assert (gc.get_freeze_count(), sys.getswitchinterval()) == (0, before)
