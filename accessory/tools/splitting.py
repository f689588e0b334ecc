"""Shared by `split.py` and `split_sparse.py`: splits the torrent release next to the script into eight shards."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Literal

from accessory.command_line import Parser
from accessory.config import ModelArgs
from accessory.convert.convert import convert
from accessory.data.tokenizer import MIXTRAL_TOKENIZER, load_tokenizer
from accessory.data.tokenizer_files import has_tokenizer
from accessory.errors import AccessoryError

SHARDS = 8


def split(script: str, to: Literal["base", "sparse"], folder_name: str) -> int:
    """Convert the checkpoint next to `script` (or else in the current folder) into the folder `folder_name` there.

    Returns the exit status: 0, or 1 after one line with the error.
    """
    parser = Parser(
        prog=Path(script).name, description=f"Convert consolidated.00.pth beside this script into {folder_name}/."
    )
    parser.add_argument("--overwrite", action="store_true", help=f"replace an existing {folder_name}/")
    parser.add_argument("--no-verify", action="store_true", help="do not read again what was written")
    options = parser.parse_args()
    beside = Path(script).resolve().parent
    source = beside if any(beside.glob("consolidated.*")) else Path.cwd()
    target = source / folder_name
    try:
        convert(source, target, to=to, shards=SHARDS, overwrite=options.overwrite, verify=not options.no_verify)
    except AccessoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not has_tokenizer(target):
        _add_tokenizer(source, target)
    print(f"{target}: {SHARDS} shards, {', '.join(sorted(p.name for p in target.iterdir() if p.suffix != '.pth'))}")
    return 0


def _add_tokenizer(source: Path, target: Path) -> None:
    """Add Mixtral-8x7B's tokenizer, which comes with this package. For another vocabulary, ask the user for one."""
    vocab_size = ModelArgs.from_files(target / "config.json").vocab_size
    if vocab_size == load_tokenizer(MIXTRAL_TOKENIZER).vocab_size:
        shutil.copyfile(MIXTRAL_TOKENIZER, target / "tokenizer.model")
        print(f"note: there is no tokenizer.model in {source}; Mixtral-8x7B's is put into {target.name}/")
    else:
        print(f"note: there is no tokenizer.model in {source}; put one of {vocab_size} pieces into {target.name}/")
