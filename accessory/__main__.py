"""`python -m accessory` is the command `accessory`."""

import sys

from accessory.cli import main

sys.exit(main())
