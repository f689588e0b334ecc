"""The wheel and the source archive: built, and the wheel tried in an environment that has nothing else."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import accessory

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


def run(*words, cwd, status=0):
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=own, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, source archive), built of a copy, because building writes beside the sources."""
    folder = tmp_path_factory.mktemp("packages")
    source = folder / "source"
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "accessory", source / "accessory", ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    pytest.importorskip("setuptools", reason="setuptools is missing: pip install setuptools")
    run(sys.executable, "-c", SDIST, folder, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    return wheel, archive


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The programs of an environment into which only the wheel was installed, and the package's folder there."""
    folder = tmp_path_factory.mktemp("empty")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    programs = folder / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", built[0], cwd=folder)
    where = run(programs / "python", "-c", "import accessory; print(accessory.__path__[0])", cwd=folder).stdout.strip()
    assert Path(where).is_relative_to(folder)
    return programs, Path(where)


def test_both_have_all_files(built):
    wheel, archive = built
    assert f"-{accessory.__version__}-" in wheel.name
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "accessory").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("accessory/")}
    assert ours - packed == {"accessory/data/assets/README.md"} - packed
    assert packed <= ours
    with tarfile.open(archive) as tar:
        assert packed <= {name.partition("/")[2] for name in tar.getnames()}


def test_the_command_runs(installed, tmp_path):
    programs, _ = installed
    assert run(programs / "accessory", "--version", cwd=tmp_path).stdout.strip().endswith(accessory.__version__)
    assert "GB" in run(programs / "accessory", "plan", "8x7b", cwd=tmp_path).stdout
    said = run(programs / "accessory", "demo", cwd=tmp_path, status=1).stderr.strip()
    assert said.startswith("accessory: error: ")
    assert "pip install" in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert (
        "pip install 'mixtral-accessory[serve]'"
        in run(programs / "accessory", "serve", tmp_path, cwd=tmp_path, status=1).stderr
    )


def test_the_originals_scripts_run_from_it(installed, tmp_path):
    programs, package = installed
    for script in ("main_finetune.py", "tools/split.py", "tools/split_sparse.py", "demos/single_turn.py"):
        assert "usage" in run(programs / "python", package / script, "--help", cwd=tmp_path).stdout.lower(), script
    scripts = sorted((package / "exps").rglob("*/*.sh"))
    assert len(scripts) == 4
    for script in scripts:
        assert run("bash", script, cwd=tmp_path, status=2).stderr.startswith(f"usage: bash {script}")
