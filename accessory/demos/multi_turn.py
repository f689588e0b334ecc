"""A web page to talk to a model: `python demos/multi_turn.py --n_gpus N --pretrained_path PATH`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: look for the package in this checkout, not for modules in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from accessory.demos import serving
from accessory.model.options import add_option
from accessory.server.page import Demo
from accessory.server.page_kinds import DIALOGUE


def main(argv: Sequence[str] | None = None, demo: Demo = DIALOGUE, program: str = "multi_turn.py") -> int:
    """Serve the page until Ctrl-C. Returns the exit status."""
    parser = serving.parser(program, "Talk to a model on a web page.", images=demo.images)
    about = "ranks to start (default: as many as --gpu_ids, else 1)"
    add_option(parser, "n_gpus", type=int, metavar="N", help=about)
    return serving.run(demo, parser.parse_args(argv), serving.start_own)


if __name__ == "__main__":
    sys.exit(main())
