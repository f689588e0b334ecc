"""Where a folder cannot be written, every command that writes one says so first, in one line, and reads nothing."""

import pytest

from accessory.cli import main

# SRC and BASE hold no model, and the text does not exist: a command that looked into them first would say that.
COMMANDS = {
    "convert": ["convert", "SRC", "DST", "--to", "hf"],
    "quantize": ["quantize", "SRC", "DST", "--quant", "int8"],
    "calibrate": ["quantize", "SRC", "DST", "--quant", "int8", "--calibrate", "no text"],
    "upcycle": ["upcycle", "SRC", "DST"],
    "merge": ["merge", "BASE", "SRC", "DST"],
    "export": ["adapter", "export", "SRC", "DST", "--base", "BASE"],
    "import": ["adapter", "import", "SRC", "DST", "--base", "BASE"],
}


@pytest.fixture(params=COMMANDS)
def refused(request, tmp_path, capsys, monkeypatch):
    """A function that runs the command with this DST, relative to the test's folder, and returns what it says."""
    monkeypatch.chdir(tmp_path)

    def run(dst, *, src="hf://owner/src"):
        places = {"SRC": src, "BASE": "base", "DST": dst}
        before = sorted(p.name for p in tmp_path.iterdir())
        assert main([places.get(word, word) for word in COMMANDS[request.param]]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        return said

    return run


def test_a_folder_that_cannot_be(refused, tmp_path, monkeypatch):
    (tmp_path / "file.txt").touch()
    for name in ("src/part", "base"):
        (tmp_path / name).mkdir(parents=True)
    assert "file.txt/x: file.txt is a file and no folder; give another" in refused("file.txt/x")
    assert "file.txt/x/y: file.txt is a file and no folder" in refused("file.txt/x/y")
    assert f"{tmp_path}/file.txt is a file and no folder" in refused(f"{tmp_path}/file.txt/x")
    assert "file.txt: is a file; give a folder to write to" in refused("file.txt")
    assert "ääää…: the name of the folder to write takes 300 bytes, at most 243 do" in refused("ä" * 150)
    assert "is the source itself" in refused("src", src="src")
    assert "holds the source src/part" in refused("src", src="src/part")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "new: nothing may be written in .; give another folder" in refused("new")
