"""A web page that answers one question at a time:
`torchrun --nproc-per-node=N demos/single_turn.py --pretrained_path PATH`.

For pretrained models choose the system prompt None. The model then continues the question itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: look for the package in this checkout, not for modules in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from accessory.demos import serving
from accessory.server.page import Demo
from accessory.server.page_kinds import SINGLE


def main(argv: Sequence[str] | None = None, demo: Demo = SINGLE, program: str = "single_turn.py") -> int:
    """Serve the page until Ctrl-C. Returns the exit status."""
    about = "Answer single questions on a web page; start it with torchrun."
    parser = serving.parser(program, about, images=demo.images)
    return serving.run(demo, parser.parse_args(argv), serving.start_launched)


if __name__ == "__main__":
    sys.exit(main())
