"""Progress of long work: `bar`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

# Seconds between two looks at it, and before the first one. In a log, every look is a line that stays.
_TERMINAL, _LOG = (0.1, 0.3), (15.0, 15.0)


def progress_bar(total: int, what: str, shown: bool = True, *, unit: str = "B") -> tqdm:
    """A bar with rate and time left on standard error; bytes are scaled. Of several processes, the first one shows it,
    and in a log it is a line now and then instead of a line that is drawn over."""
    from tqdm import tqdm

    interval, delay = _TERMINAL if sys.stderr.isatty() else _LOG
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        disable=not shown or os.environ.get("RANK", "0") != "0",
        leave=False,
        mininterval=interval,
        delay=delay,
    )
