"""Runs the commands that stand above the tables of benchmarks/README.md again, one after the other.

    python benchmarks/rerun.py --list
    python benchmarks/rerun.py "A training step" "The server" [--out DIR] [--each 300] [--minutes 9] [--archive FILE]

A section is named by its heading or the beginning of it. Each command's output goes to a file of its own while it
comes, and stays there when time runs out. A command with alternatives in brackets runs once for each.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).with_name("README.md")
COMMAND = re.compile(r" {4}((?:accessory|torchrun|python|make) .*)")


class Command(NamedTuple):
    section: str
    words: str  # as a shell takes them


def commands_of(page: str) -> list[Command]:
    """The commands of a page, in its order, by the headings above them."""
    found, section = [], ""
    for line in page.splitlines():
        if line.startswith("#"):
            section = line.lstrip("#").strip()
        elif match := COMMAND.fullmatch(line):
            found += [Command(section, words) for words in alternatives(match[1])]
    return found


def alternatives(words: str) -> Iterator[str]:
    """`a [b | c]` is `a`, `a b` and `a c`."""
    parts = re.split(r" *\[([^]]*)\]", words)
    fixed = [[part] for part in parts[::2]]
    free = [["", *(f" {choice.strip()}" for choice in part.split("|"))] for part in parts[1::2]]
    choices = [*itertools.chain(*zip(fixed, free, strict=False)), fixed[-1]]
    return ("".join(words) for words in itertools.product(*choices))


def chosen(commands: list[Command], sections: list[str]) -> list[Command]:
    """The commands of some sections, in the order in which these are named."""
    out = []
    for name in sections:
        of_section = [c for c in commands if c.section.lower().startswith(name.lower())]
        if not of_section:
            raise SystemExit(f"rerun: no command stands under a heading that begins with {name!r}; --list shows them")
        out += of_section
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help="headings, or their beginnings")
    parser.add_argument("--list", action="store_true", help="show all commands")
    parser.add_argument("--out", type=Path, default=Path("rerun"), help="the folder for outputs")
    parser.add_argument("--each", type=float, default=300, help="seconds that a command may take")
    parser.add_argument("--minutes", type=float, default=60, help="no command begins, or goes on, after so many")
    parser.add_argument("--archive", type=Path, help="a .tgz of the outputs, written anew after each command")
    options = parser.parse_args()
    commands = commands_of(README.read_text())
    if options.list or not options.sections:
        for command in commands:
            print(f"{command.section}: {command.words}")
        return 0
    end, failed = time.monotonic() + 60 * options.minutes, 0
    options.out.mkdir(parents=True, exist_ok=True)
    for number, command in enumerate(wanted := chosen(commands, options.sections), start=1):
        left = min(options.each, end - time.monotonic())
        status = run(command, options.out / f"{number:02}.log", left) if left > 0 else "not begun: time is up"
        failed += status != "done"
        print(f"{number} of {len(wanted)}: {status}: {command.words}", flush=True)
        if options.archive:
            with tarfile.open(options.archive, "w:gz") as archive:
                archive.add(options.out, arcname=options.out.name)
    return 1 if failed else 0


def run(command: Command, log: Path, seconds: float) -> str:
    """Run a command with the Python that runs this; returns how it ended."""
    words = re.sub(r"^accessory ", "python -m accessory ", command.words)
    words = re.sub(r"^torchrun ", "python -m torch.distributed.run ", words)
    words = re.sub(r"(^|&& )python ", rf"\1{sys.executable} ", words)
    began = time.monotonic()
    with log.open("w") as out:
        out.write(f"{command.section}\n{command.words}\n\n")
        out.flush()
        process = subprocess.Popen(words, shell=True, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
            process.wait()
            return f"cut off after {seconds:.0f} s"
    took = time.monotonic() - began
    return "done" if code == 0 else f"exit status {code} after {took:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
