"""Ends a command: gives its exit status, and prints a user's mistake as one line. All entry points of commands use it.

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable

from accessory.commands.interrupting import kept_interrupts
from accessory.errors import RankError, is_out_of_memory, is_users, one_line
from accessory.launch.ending import FIRST_SPEAKS
from accessory.launch.environment import launched_rank
from accessory.launch.speaking import set_up_logging


def outcome(run: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run a command. Returns the exit status: 0 done, 1 failed, 130 interrupted.

    With several ranks, only the first one prints. Another rank prints a warning or an error that it may have alone.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be text
    rank = launched_rank()
    set_up_logging(rank, debug=debug)
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        with kept_interrupts():
            return run() or 0
    except KeyboardInterrupt:
        if not rank:
            print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) has ended. Python would print another error when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug or not is_users(error):
            raise
        if rank:
            time.sleep(FIRST_SPEAKS)
        if not rank or _may_be_of_one_rank(error):
            who = f"rank {rank}: " if rank else ""
            print(f"accessory: error: {who}{one_line(error)}", file=sys.stderr, flush=True)
        return 1


def _may_be_of_one_rank(error: Exception) -> bool:
    """Whether a single rank may have this error: disks and memory differ, configurations and inputs do not."""
    return isinstance(error, OSError | RankError) or is_out_of_memory(error)
