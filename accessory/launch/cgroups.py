"""The control groups that this process is in: a container's limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cgroup_folders(controller: str, proc: Path = PROC, mounted: Path = MOUNTED) -> Iterator[Path]:
    """The folder of each cgroup with this controller that the process is in, and of each of those above it.

    Version 1 has a hierarchy for each controller, version 2 one for all.
    """
    for line in lines_of(proc):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for base in (mounted / controller,) if controllers else (mounted, mounted / "unified"):
            folder = base / path.lstrip("/")
            for above in (folder, *folder.parents):
                yield above
                if above == base:
                    break


def lines_of(path: Path) -> list[str]:
    """A file's lines; none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
