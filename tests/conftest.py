"""What every test shares: the helpers' path, and small thread pools so that parallel runs do not fight for cores."""

import os
import sys
from pathlib import Path

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

# How long an example takes says something of the machine and its other work, and nothing of what is tested.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
