"""A web page to talk to a model about an image: `python demos/multi_turn_mm.py --n_gpus N --pretrained_path PATH`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: look for the package in this checkout, not for modules in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from accessory.demos import multi_turn
from accessory.server.page_kinds import DIALOGUE_WITH_IMAGE


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C. Returns the exit status."""
    return multi_turn.main(argv, DIALOGUE_WITH_IMAGE, "multi_turn_mm.py")


if __name__ == "__main__":
    sys.exit(main())
