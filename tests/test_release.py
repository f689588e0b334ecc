"""A release: version, changelog, commit, tag and packages, or nothing at all."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

import accessory

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("release", ROOT / "deploy" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def git(folder, *words):
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository of the package alone."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "accessory", folder / "accessory", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    news = "## Unreleased\n\n### Added\n- All of it.\n"
    (folder / "CHANGELOG.md").write_text(f"# Changes\n\n{news}\n## 0.0.1 - 2020-01-01\n")
    git(folder, "init", "--quiet", "--initial-branch", "main")
    for name, value in (("user.name", "A"), ("user.email", "a@example.org")):
        git(folder, "config", name, value)
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "Begin")
    return folder


@pytest.mark.parametrize(
    ("version", "change", "says"),
    [
        ("1.2", None, "version: got '1.2'"),
        ("0.0.9", None, f"version: got 0.0.9, but {accessory.__version__} is there already"),
        ("9.0.0", lambda folder: (folder / "README.md").write_text("x"), "changes that are not committed"),
        ("9.0.0", lambda folder: git(folder, "switch", "--quiet", "--create", "mine"), "but this is mine"),
        ("9.0.0", lambda folder: nothing_new(folder), "nothing stands below '## Unreleased'"),
        ("9.0.0", lambda folder: git(folder, "tag", "v9.0.0"), "version: got 9.0.0, but 9.0.0 is there already"),
    ],
)
def test_what_cannot_be_released_is_one_line_and_changes_nothing(program, checkout, capsys, version, change, says):
    if change is not None:
        change(checkout)
    before = git(checkout, "rev-parse", "HEAD"), git(checkout, "status", "--porcelain")
    assert program.main([version], checkout) == 1
    err = capsys.readouterr().err
    assert err.startswith("release: ")
    assert says in err
    assert len(err.splitlines()) == 1
    assert (git(checkout, "rev-parse", "HEAD"), git(checkout, "status", "--porcelain")) == before
    assert not (checkout / "dist").exists()


def nothing_new(folder):
    (folder / "CHANGELOG.md").write_text("# Changes\n\n## Unreleased\n\n## 0.0.1 - 2020-01-01\n- All.\n")
    git(folder, "commit", "--quiet", "--all", "--message", "Say nothing")


@pytest.mark.slow
def test_a_release(program, checkout, capsys):
    pytest.importorskip("build", reason="build is missing: pip install build")
    assert program.main(["9.1.0"], checkout) == 0
    assert "tagged v9.1.0" in capsys.readouterr().out
    assert git(checkout, "log", "-1", "--format=%s") == "Release 9.1.0"
    assert git(checkout, "describe") == "v9.1.0"
    assert git(checkout, "status", "--porcelain") == ""
    assert '__version__ = "9.1.0"' in (checkout / "accessory" / "__init__.py").read_text()
    changes = (checkout / "CHANGELOG.md").read_text()
    assert changes.startswith("# Changes\n\n## Unreleased\n\n## 9.1.0 - 20")
    assert changes.index("9.1.0") < changes.index("All of it") < changes.index("0.0.1")
    names = {path.name for path in (checkout / "dist").iterdir()}
    assert names == {"mixtral_accessory-9.1.0-py3-none-any.whl", "mixtral_accessory-9.1.0.tar.gz"}
