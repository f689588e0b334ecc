"""What is kept of a run: a page's section with its tables, and a line of a log. Files appear whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path

from accessory.errors import InputError
from accessory.train.metrics import write_whole

END = "<!-- end of accessory bench -->"
INDENT = "    "
BEGINNINGS = (INDENT + "accessory bench", INDENT + "torchrun")  # of sections
LOG_COLUMNS = ("version", "date", "card", "command", "figures", "expected")
LOG_TITLE = "# Log of figures"
LOG_ABOUT = "Each row is a run of `accessory bench --log`: what came out, and what was expected before."


def section(command: str, lines: Sequence[str]) -> str:
    """What a page holds of a run: its command line, then what it measured."""
    return "\n".join([INDENT + command, "", *lines, "", END])


def with_section(page: str, command: str, lines: Sequence[str]) -> str:
    """The page with the section of this command replaced, or added at its end.

    A section begins with its command line, and ends with the comment `END`. All else stays as it is. InputError where
    that comment is missing: what follows was written by hand, and nothing says how much of it is old.
    """
    new, found = section(command, lines), page.splitlines()
    try:
        first = found.index(INDENT + command)
    except ValueError:
        return page.rstrip("\n") + f"\n\n{new}\n"
    begins = [n for n, line in enumerate(found) if n > first and line.startswith((*BEGINNINGS, "#"))]
    until = begins[0] if begins else len(found)
    last = next((n for n in range(first, until) if found[n] == END), None)
    if last is None:
        raise InputError(f"--readme: the section of {command!r} has no line {END!r}; add it below the last table")
    return "\n".join([*found[:first], new, *found[last + 1 :]]) + "\n"


def write_section(path: Path, command: str, lines: Sequence[str]) -> None:
    text = with_section(path.read_text(encoding="utf-8") if path.exists() else "# Figures\n", command, lines)
    with write_whole(path) as file:
        file.write(text.encode())


def append_line(path: Path, version: str, card: str, command: str, figures: str, expected: str) -> None:
    """Add a row to the log's table. The log begins where there is none yet."""
    text = path.read_text(encoding="utf-8").rstrip("\n") if path.exists() else ""
    if not text:
        head = "| " + " | ".join(LOG_COLUMNS) + " |\n|" + "---|" * len(LOG_COLUMNS)
        text = f"{LOG_TITLE}\n\n{LOG_ABOUT}\n\n{head}"
    values = (version, date.today().isoformat(), card, f"`{command}`", figures, expected or "–")
    with write_whole(path) as file:
        file.write(f"{text}\n| {' | '.join(value.replace('|', '/') for value in values)} |\n".encode())
