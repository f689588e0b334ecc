"""Which rank warns."""

import logging
import os
import subprocess
import sys
import warnings

import pytest

from accessory.launch.speaking import no_warnings

WARNS = """
import logging, warnings
from accessory.commands.outcome import outcome
from accessory.launch.speaking import OF_ONE_RANK
def run():
    log = logging.getLogger("x")
    log.warning("all see %s", "this")
    log.warning("one sees %s", "that", extra=OF_ONE_RANK)
    log.error("an error")
    warnings.warn("python's own")
outcome(run, debug={debug})
"""


@pytest.mark.parametrize(
    ("rank", "debug", "said"),
    [
        (0, False, ["WARNING: all see this", "WARNING: one sees that", "ERROR: an error", "UserWarning: python's own"]),
        (1, False, ["WARNING: rank 1: one sees that", "ERROR: an error"]),
        (1, True, ["WARNING: all see this", "WARNING: one sees that", "ERROR: an error", "UserWarning: python's own"]),
    ],
)
def test_ranks_above_the_first_warn_of_their_own_alone(rank, debug, said):
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
    words = [sys.executable, "-c", WARNS.format(debug=debug)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if not line.startswith(" ")]
    assert len(lines) == len(said)
    assert all(line.endswith(end) for line, end in zip(lines, said, strict=True)), lines


def test_a_driver_leaves_warnings_to_its_ranks(caplog, recwarn):
    with no_warnings():
        logging.getLogger("x").warning("not said")
        warnings.warn("not said", stacklevel=1)
    logging.getLogger("x").warning("said")
    assert [record.getMessage() for record in caplog.records] == ["said"]
    assert not recwarn.list
