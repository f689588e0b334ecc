"""What every test shares: the helpers' path, and small thread pools so that parallel runs do not fight for cores."""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

# How long an example takes says something of the machine and its other work, and nothing of what is tested.
settings.register_profile("shared machine", deadline=None)
# `make test` tries the same examples every time, so that a change fails for what it changed; `make test-all` explores.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("shared machine")

# A shell ignores Ctrl-C for what it starts in the background, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_chance():
    """A test that draws numbers without a seed of its own draws the same ones alone and among others."""
    import torch

    torch.manual_seed(0)
