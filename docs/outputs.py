"""Runs the commands whose outputs the pages show, and writes what they print below them.

python docs/outputs.py            rewrites blocks that are no longer what comes out
python docs/outputs.py --check    exits with 1 if there are any, and says which

A block of a page is an output where a comment before it names the command: <!-- output of: accessory info PATH -->. All
commands run one after another in one empty folder, in which `accessory demo` leaves demo-model. Times, rates and ports
may differ, as may what … stands for.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/tutorial.md", "docs/quantization.md")
BLOCK = re.compile(r"(<!-- output of: (.*?) -->\n\n?```text\n)(.*?)(^```)", re.MULTILINE | re.DOTALL)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# What differs from run to run: seconds, rates, ports, and where the command lies.
VARIES = (
    (re.compile(r"\b[\d.,]+ (s|tokens/s)\b"), r"# \1"),
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:#"),
    (re.compile(r"\S*bin/accessory"), "accessory"),
)


def main(words: list[str] | None = None, root: Path = ROOT, kept: Path | None = None) -> int:
    """kept: the empty folder to run in, which stays; by default one that does not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args(words).check
    wrong = 0
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory() as folder:
        for name in PAGES:
            page = root / name
            text = page.read_text()
            new = BLOCK.sub(partial(_renewed, folder=Path(folder), name=name), text)
            wrong += new != text
            if not check and new != text:
                page.write_text(new)
    return int(check and wrong > 0)


def _renewed(found: re.Match[str], folder: Path, name: str) -> str:
    opening, command, shown, closing = found.groups()
    printed = output_of(command, folder)
    if alike(shown, printed):
        return found[0]
    print(f"{name}: {command}")
    print("\n".join(difflib.unified_diff(shown.splitlines(), printed.splitlines(), "shown", "printed", lineterm="")))
    return f"{opening}{printed}{closing}"


def output_of(command: str, folder: Path) -> str:
    """What a command prints. RuntimeError where it fails."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr or done.stdout}")
    lines = COLOURS.sub("", done.stdout).splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def alike(shown: str, printed: str) -> bool:
    """Whether a block shows what was printed, but for what varies."""
    for pattern, instead in VARIES:
        shown, printed = pattern.sub(instead, shown), pattern.sub(instead, printed)
    pattern = re.escape(shown.strip()).replace(re.escape("…"), ".*")
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


if __name__ == "__main__":
    sys.exit(main())
