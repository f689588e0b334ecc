"""Conversion as a whole: no half-written folder looks whole, no user's file is lost, memory stays bounded."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import checkpoints as make
from helpers.checkpoints import ARGS, random_tensors

from accessory.checkpoint import save
from accessory.checkpoint.folder import open_checkpoint
from accessory.convert.convert import convert
from accessory.convert.info import info
from accessory.convert.verify import verify
from accessory.data.tokenizer import MIXTRAL_TOKENIZER
from accessory.errors import CheckpointError

TENSORS = random_tensors()


@pytest.fixture
def source(tmp_path):
    return make.write_torrent(tmp_path / "source", TENSORS)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_destination_in_use_is_refused(source, tmp_path):
    dst = tmp_path / "out"
    dst.mkdir()
    convert(source, dst, to="base", shards=2, progress=False)  # an empty folder is accepted
    before = names(dst)
    with pytest.raises(CheckpointError, match="out: is not empty; give --overwrite"):
        convert(source, dst, to="sparse", progress=False)
    assert names(dst) == before
    convert(source, dst, to="sparse", shards=4, overwrite=True, progress=False)
    assert open_checkpoint(dst).layout == "sparse"
    assert names(tmp_path) == ["out", "source"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file: is a file"):
        convert(source, tmp_path / "file", to="base", overwrite=True, progress=False)


def test_overwriting_replaces_checkpoints_only(source, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="thesis: holds something else than a checkpoint"):
        convert(source, tmp_path / "thesis", to="base", overwrite=True, progress=False)
    assert names(tmp_path / "thesis") == ["chapter.tex"]


def test_a_failed_overwrite_keeps_what_was_there(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "out", to="base", shards=2, progress=False)
    before = names(tmp_path / "out")
    monkeypatch.setattr(save, "_check_written", lambda *_: (_ for _ in ()).throw(CheckpointError("failing disk")))
    with pytest.raises(CheckpointError, match="failing disk"):
        convert(source, tmp_path / "out", to="sparse", overwrite=True, progress=False)
    assert names(tmp_path / "out") == before
    assert verify(tmp_path / "out", progress=False).ok
    assert names(tmp_path) == ["out", "source"]


def test_source_and_destination_must_not_overlap(source, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(source)
    for dst in (source, link, source / ".." / "source"):
        with pytest.raises(CheckpointError, match="is the source itself"):
            convert(source, dst, to="base", overwrite=True, progress=False)
    with pytest.raises(CheckpointError, match="holds the source"):
        convert(source, tmp_path, to="base", overwrite=True, progress=False)
    assert verify(source, progress=False).ok
    convert(source, source / "converted", to="base", progress=False)  # a folder inside the source is accepted
    assert verify(source, source / "converted", progress=False).ok


def test_what_reads_back_differently_is_noticed(source, tmp_path, monkeypatch):
    write_at = save._write_at

    def failing(handle, data, offset):
        spoilt = bytearray(data)
        spoilt[-1] ^= 1
        return write_at(handle, memoryview(spoilt), offset)

    monkeypatch.setattr(save, "_write_at", failing)
    with pytest.raises(CheckpointError, match=r"reads back differently: .*tok_embeddings\.weight"):
        convert(source, tmp_path / "out", to="sparse", progress=False)
    assert names(tmp_path) == ["source"]
    convert(source, tmp_path / "out", to="sparse", verify=False, progress=False)  # unverified, the error stays
    assert not verify(source, tmp_path / "out", progress=False).ok


def test_a_disk_without_room_is_noticed_before_writing(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"GB are needed, but 0\.00 GB are free"):
        convert(source, tmp_path / "out", to="base", progress=False)
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, *(pytest.param(code, marks=pytest.mark.slow) for code in (errno.EIO, errno.EDQUOT))]
)
@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "fsync"])
def test_a_disk_that_fills_up_or_fails_midway(source, tmp_path, monkeypatch, code, call):
    real, calls = getattr(os, call), []

    def failing(*args):
        calls.append(args)
        if len(calls) > 5:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    if call == "fdatasync":
        monkeypatch.setattr(save, "_write_tensor", slowly(save._write_tensor))
    with pytest.raises(CheckpointError, match=f"out.*cannot be written .*{os.strerror(code)}"):
        convert(source, tmp_path / "out", to="base", progress=False)
    assert names(tmp_path) == ["source"]


def slowly(function):
    def wrapped(*args):
        time.sleep(0.02)
        return function(*args)

    return wrapped


def test_a_really_full_disk(source, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        with pytest.raises(CheckpointError, match="are needed"):
            convert(source, small / "out", to="base", progress=False)
        monkeypatch.setattr(save, "check_free_space", lambda *_: None)
        with pytest.raises(CheckpointError, match=r"cannot be written .*No space left"):
            convert(source, small / "out", to="base", progress=False)
        assert names(small) == []
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def killed_midway(source: Path, dst: Path, when: str) -> None:
    """Start a conversion in another process and kill -9 it at `when`."""
    code = f"""
import os, sys, time
from accessory.checkpoint import save
from accessory.convert.convert import convert
def stop(*_):
    os.write(1, b"now\\n")
    time.sleep(60)
seen = []
real = save.{when}
def counted(*args):
    seen.append(1)
    return stop() if len(seen) > {20 if when == "_write_tensor" else 0} else real(*args)
save.{when} = counted
convert(sys.argv[1], sys.argv[2], to="sparse", shards=4, overwrite=True, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(dst)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("when", ["_write_tensor", pytest.param("_check_written", marks=pytest.mark.slow)])
def test_a_kill_midway_leaves_nothing_that_looks_whole(source, tmp_path, when):
    dst = tmp_path / "out"
    killed_midway(source, dst, when)
    assert names(tmp_path) == ["out.partial", "source"]
    with pytest.raises(CheckpointError, match=r"out\.partial: unfinished"):
        open_checkpoint(tmp_path / "out.partial")
    report = verify(tmp_path / "out.partial", progress=False)
    assert not report.ok
    assert report.hash == ""
    assert not info(tmp_path / "out.partial").complete
    convert(source, dst, to="base", progress=False)  # a rerun clears it away
    assert names(tmp_path) == ["out", "source"]
    assert verify(source, dst, progress=False).ok


def test_somebody_elses_partial_folder_is_not_removed(source, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out\.partial: is in the way and not ours"):
        convert(source, tmp_path / "out", to="base", progress=False)
    assert names(tmp_path / "out.partial") == ["mine"]


def test_two_writers_of_one_folder(source, tmp_path, monkeypatch):
    reached, go_on = threading.Event(), threading.Event()
    check = save._check_written

    def wait(*args):
        reached.set()
        assert go_on.wait(30)
        check(*args)

    monkeypatch.setattr(save, "_check_written", wait)
    first = threading.Thread(target=convert, args=(source, tmp_path / "out"), kwargs={"to": "base", "progress": False})
    first.start()
    try:
        assert reached.wait(30)
        with pytest.raises(CheckpointError, match=r"out\.partial: another process is writing"):
            convert(source, tmp_path / "out", to="base", progress=False)
    finally:
        go_on.set()
        first.join()
    assert verify(source, tmp_path / "out", progress=False).ok


@pytest.mark.slow
@pytest.mark.parametrize("to", ["sparse", "gguf"])
def test_anonymous_memory_stays_small(tmp_path, to):
    """Of 184 MB (two tensors have 67 MB), only blocks are in memory at once, in two to four threads."""
    args = ARGS.replace(dim=1024, hidden_dim=1024, vocab_size=32768, n_layers=1)
    make.write_torrent(tmp_path / "source", random_tensors(args), args)
    shutil.copy(MIXTRAL_TOKENIZER, tmp_path / "source" / "tokenizer.model")
    code = """
import sys, threading
import torch
from accessory.convert.convert import convert
from accessory.convert.verify import verify
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1000
source, target, to = sys.argv[1:]
start, end, peak = anonymous(), threading.Event(), [0]
def watch():
    while not end.wait(0.002):
        peak[0] = max(peak[0], anonymous())
threading.Thread(target=watch, daemon=True).start()
convert(source, target, to=to, type="q8_0" if to == "gguf" else None, progress=False)
assert verify(source, target, progress=False).ok
end.set()
print(peak[0] - start)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    arguments = [str(tmp_path / "source"), str(tmp_path / "target"), to]
    out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 140


@pytest.mark.parametrize(
    ("script", "folder", "kind"),
    [
        ("split.py", "converted", "base"),
        pytest.param("split_sparse.py", "converted_sparse", "sparse", marks=pytest.mark.slow),
    ],
)
def test_split_scripts_beside_the_release(source, script, folder, kind):
    tools = Path(__file__).parents[2] / "accessory" / "tools"
    for name in ("tokenizer.model", "split.py", "split_sparse.py"):
        (source / name).write_bytes((tools / name).read_bytes() if name.endswith(".py") else b"pieces")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, script], cwd=source, env=environment, capture_output=True, text=True, check=False
        )

    assert run().returncode == 0
    shards = [f"consolidated.{r:02d}-of-08.model.pth" for r in range(8)]
    assert names(source / folder) == ["config.json", *shards, "meta.json", "tokenizer.model"]
    first = torch.load(source / folder / shards[3], weights_only=True)["model"]
    expected = make.shard(TENSORS, kind, 3, 8)
    assert all(torch.equal(first["llma." + name], tensor) for name, tensor in expected.items())
    again = run()
    assert again.returncode == 1
    assert re.fullmatch(rf"error: .*{folder}: is not empty; .*\n", again.stderr)


def test_split_script_without_the_package_says_so(source):
    tools = Path(__file__).parents[2] / "accessory" / "tools"
    shutil.copy(tools / "split.py", source)
    code = "import sys; sys.modules['accessory'] = None; import runpy; runpy.run_path('split.py', run_name='__main__')"
    out = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert out.stderr.startswith("error: the package accessory cannot be imported")
    assert out.stderr.count("\n") == 1
