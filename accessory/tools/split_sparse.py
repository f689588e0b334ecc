"""Put this file next to consolidated.00.pth and run `python split_sparse.py`. It makes converted_sparse/ (eight
shards)."""

import sys

try:
    from accessory.tools.splitting import split
except ImportError as error:
    sys.exit(
        f"error: the package accessory cannot be imported ({error}); install it with `pip install -e .` in its clone"
    )

if __name__ == "__main__":
    sys.exit(split(__file__, to="sparse", folder_name="converted_sparse"))
