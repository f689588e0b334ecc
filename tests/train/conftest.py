"""Fixtures for tests of whole runs: the files of a run, and two runs without interruption."""

from pathlib import Path

import pytest
from helpers import runs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def whole(inputs, tmp_path_factory) -> Path:
    """The output folder of a run without interruption."""
    output = tmp_path_factory.mktemp("whole") / "run"
    runs.finetune(inputs, output, eval_data=str(inputs / "held.yaml"), eval_interval=5)
    return output


@pytest.fixture(scope="session")
def part(inputs, tmp_path_factory) -> Path:
    """The output folder of a run that was interrupted after 4 of its 12 steps. Tests resume in copies of it."""
    output = tmp_path_factory.mktemp("part") / "run"
    runs.interrupt(inputs, output, 4)
    return output
