"""The progress bar of long work: `progress_bar`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

# Seconds between two updates, and before the first one. In a log, every update adds a line.
_TERMINAL, _LOG = (0.1, 0.3), (15.0, 15.0)


def progress_bar(total: int, what: str, shown: bool = True, *, unit: str = "B", done: int = 0) -> tqdm:
    """A progress bar on standard error, with rate and remaining time. Bytes are shown in kB, MB and GB.

    Of several processes, only the first one (RANK 0) shows it. A terminal redraws the line; a log gets a new line now
    and then.
    """
    from tqdm import tqdm

    interval, delay = _TERMINAL if sys.stderr.isatty() else _LOG
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        disable=not shown or os.environ.get("RANK", "0") != "0",
        leave=False,
        mininterval=interval,
        delay=delay,
    )
