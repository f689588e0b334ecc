"""A web page that answers one question at a time, about an image or without one:
`torchrun --nproc-per-node=N demos/single_turn_mm.py --pretrained_path PATH`.

With the system prompt caption, or with None and an empty question, the prompt is the image alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: look for the package in this checkout, not for modules in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from accessory.demos import single_turn
from accessory.server.page_kinds import SINGLE_WITH_IMAGE


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C. Returns the exit status."""
    return single_turn.main(argv, SINGLE_WITH_IMAGE, "single_turn_mm.py")


if __name__ == "__main__":
    sys.exit(main())
