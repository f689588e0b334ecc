"""Which process of a run warns: the first rank of what all ranks see, and any rank of what only it can know.

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

OF_ONE_RANK = {"of_one_rank": True}  # log.warning(…, extra=OF_ONE_RANK): other ranks may not know this


def set_up_logging(rank: int, *, debug: bool = False) -> None:
    """Print warnings and errors, with `debug` everything. Ranks above 0 leave out what the first rank says as well."""
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s: %(message)s")
    if rank and not debug:
        warnings.simplefilter("ignore")
        for handler in logging.getLogger().handlers:
            handler.addFilter(_OwnWarnings(rank))


class _OwnWarnings(logging.Filter):
    """Lets pass what only this rank can know, and says the rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "of_one_rank", False):
            record.msg = f"rank {self.rank}: {record.msg}"
            return True
        return record.levelno > logging.WARNING


@contextmanager
def no_warnings() -> Iterator[None]:
    """Inside the block nothing is warned of: ranks that this process will start say it again."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
