"""What every test shares: the helpers' path, and small thread pools so that parallel runs do not fight for cores."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

# Python keeps compiled files, whatever the shell asks for. Otherwise every worker and every process that a test starts
# would compile the same sources anew, and pytest would rewrite the assertions of all tests in each run.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# No deadline: how long an example takes depends on the machine's load, not on the tested code.
settings.register_profile("shared machine", deadline=None)
# `make test` tries the same examples every time, so a failure comes from the change. `make test-all` tries new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("shared machine")

# A shell makes its background processes ignore Ctrl-C. Every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keeps the garbage collector away from modules and test items: none of them ends before the run does.

    They are more than a million objects. Python would look at all of them again and again while tests run.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def seed_of_all_devices() -> Callable[[int], object]:
    """torch.manual_seed, without what it does for devices that are not there.

    For each kind of device that was not used yet it notes down the whole call stack: about a millisecond a test.
    """
    import torch

    return torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def same_chance(seed_of_all_devices):
    """Seed torch before each test, so that a test draws the same numbers alone and in a run of all tests."""
    seed_of_all_devices(0)
