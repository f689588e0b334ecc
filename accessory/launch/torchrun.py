"""Runs a Python program on several ranks of this machine with torchrun, which starts, watches and ends them."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from accessory.errors import RankError
from accessory.launch.threads import cores

# Seconds that a rank has after Ctrl-C to end its step and save its state. torchrun's default is 30.
SAVING = "600"


def run_under_torchrun(n: int, words: Sequence[str], *, debug: bool = False) -> int:
    """Run `python …words` as n ranks of this machine; returns the exit status.

    Ctrl-C and SIGTERM reach the ranks, which then save a state. The ranks print their own errors. RankError for a rank
    that could not, because a signal ended it.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVING)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // n)))
    if not debug:
        logging.disable(logging.ERROR)  # hides torchrun's own messages about failures
    arguments = torchrun.parse_args(["--standalone", f"--nproc-per-node={n}", "--no-python", sys.executable, *words])
    if sys.stderr.isatty():
        print(f"starting {n} ranks …", file=sys.stderr, flush=True)  # they import torch for some seconds
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        ended = _ended_by_signals({rank: failure.exitcode for rank, failure in sorted(error.failures.items())})
        if ended:
            said = ", ".join(f"rank {rank} was ended by signal {number}" for rank, number in ended.items())
            raise RankError(f"{said}; all ranks are ended") from error
        return 1
    except SignalException:
        return 1
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _ended_by_signals(exit_codes: dict[int, int]) -> dict[int, int]:
    """The signals, by rank, that explain a failure; none where a rank failed by itself, which said why.

    Where one rank fails, torchrun ends the others by SIGTERM, and may count those that it ended among the failures.
    """
    others = {rank: code for rank, code in exit_codes.items() if code != -signal.SIGTERM}
    return {rank: -code for rank, code in (others or exit_codes).items() if code < 0}
