"""The site of the documentation is built without a warning: every link and every anchor leads somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def test_every_link_holds_and_nothing_is_fetched_from_elsewhere(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install 'mixtral-accessory[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=quiet)
    assert done.returncode == 0, done.stderr
    assert "excluded" not in done.stderr, done.stderr
    pages = {path.stem: path.read_text() for path in tmp_path.glob("*.html")}
    written = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"README"}
    assert written | {"index", "figures", "examples", "changelog", "contributing", "api", "404"} <= pages.keys()
    assert "check_vocabulary" in pages["api"], "methods and their docstrings are there"
    loaded = r"""<(?:script|img|link)[^>]*\s(?:src|href)=["']?(https?://[^"'\s>]*)"""
    fetched = {address for page in pages.values() for address in re.findall(loaded, page)}
    assert fetched == set()
