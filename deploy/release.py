"""Makes a release: the version, the changelog's heading, a commit, a tag, and the packages in dist/.

    python deploy/release.py 0.2.0

Checks all of it first, so that a release that cannot be made changes nothing. Nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION_FILE, CHANGELOG = Path("accessory/__init__.py"), Path("CHANGELOG.md")
VERSION = re.compile(r'^__version__ = "(.*)"$', re.MULTILINE)
UNRELEASED = "## Unreleased\n"


class RefusedError(Exception):
    """What stands in the way, in one line."""


def main(words: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="as 1.2.3, above the last one")
    version = parser.parse_args(words).version
    try:
        release(root, version)
    except RefusedError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    print(f"{version} is committed and tagged v{version}, its packages are in dist/; git push --follow-tags sends it")
    return 0


def release(root: Path, version: str) -> None:
    source, changes = (root / VERSION_FILE).read_text(), (root / CHANGELOG).read_text()
    _check(root, version, source, changes)
    today = datetime.date.today().isoformat()
    new_changes = changes.replace(UNRELEASED, f"{UNRELEASED}\n## {version} - {today}\n", 1)
    with tempfile.TemporaryDirectory() as folder:  # of a copy: building writes beside the sources, and may fail
        copy = Path(folder) / "source"
        _git(root, "clone", "--quiet", "--no-local", ".", str(copy))
        (copy / VERSION_FILE).write_text(VERSION.sub(f'__version__ = "{version}"', source))
        built = _build(copy)
        (root / "dist").mkdir(exist_ok=True)
        for package in built:
            (root / "dist" / package.name).write_bytes(package.read_bytes())
    (root / VERSION_FILE).write_text(VERSION.sub(f'__version__ = "{version}"', source))
    (root / CHANGELOG).write_text(new_changes)
    _git(root, "commit", "--quiet", "--message", f"Release {version}", str(VERSION_FILE), str(CHANGELOG))
    _git(root, "tag", "--annotate", f"v{version}", "--message", f"Release {version}")


def _check(root: Path, version: str, source: str, changes: str) -> None:
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise RefusedError(f"version: got {version!r}, but it has three numbers, as 1.2.3")
    found = VERSION.search(source)
    if found is None:
        raise RefusedError(f"{VERSION_FILE}: no line __version__ = …")
    last = found[1]
    if _numbers(version) < _numbers(last) or _git(root, "tag", "--list", f"v{version}"):
        raise RefusedError(f"version: got {version}, but {max(version, last, key=_numbers)} is there already")
    if _git(root, "status", "--porcelain"):
        raise RefusedError("the checkout has changes that are not committed; commit or stash them")
    if (branch := _git(root, "branch", "--show-current")) != "main":
        raise RefusedError(f"releases are made on main, but this is {branch or 'no branch'}")
    news = changes.partition(UNRELEASED)[2].partition("\n## ")[0]
    if not re.search(r"^- ", news, re.MULTILINE):
        raise RefusedError(f"{CHANGELOG}: nothing stands below {UNRELEASED.strip()!r}; say what is new")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _build(folder: Path) -> list[Path]:
    out = folder.parent / "dist"
    for what in ("--wheel", "--sdist"):
        done = subprocess.run(
            [sys.executable, "-m", "build", "--quiet", what, "--outdir", str(out), str(folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            raise RefusedError(f"the packages cannot be built: {lines[-1]}")
    return sorted(out.iterdir())


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RefusedError(f"git {words[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
