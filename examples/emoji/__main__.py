"""What `python -m examples.emoji` runs."""

import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())
