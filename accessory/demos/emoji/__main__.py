"""`python -m accessory.demos.emoji`."""

import sys

from accessory.demos.emoji.run import main

if __name__ == "__main__":
    sys.exit(main())
