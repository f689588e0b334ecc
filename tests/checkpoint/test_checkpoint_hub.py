"""hf:// addresses against a stand-in for the Hub on localhost, driven through the real huggingface_hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.examples import examples
from helpers.hub_server import HubServer, Repo, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.checkpoint import hub
from accessory.errors import CheckpointError, MissingExtraError

BIG = bytes(range(256)) * 200  # 51,200 bytes: served through a redirect, as large files are
INDEX = json.dumps(
    {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
).encode()

MIXTRAL = Repo(
    {
        "README.md": b"# hello",
        "config.json": b'{"model_type": "mixtral"}',
        "generation_config.json": b"{}",
        "tokenizer.model": b"tok" * 700,
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": INDEX,
        "model-00001-of-00002.safetensors": BIG,
        "model-00002-of-00002.safetensors": BIG[::-1],
        "model.fp32-00001-of-00001.safetensors": BIG,
        "pytorch_model.bin.index.json": b"{}",
        "pytorch_model-00001-of-00001.bin": BIG,
        "consolidated.00.pt": BIG,
        "consolidated.01.pt": BIG,
        "params.json": b"{}",
        "converted/consolidated.00-of-02.model.pth": BIG,
        "converted/consolidated.01-of-02.model.pth": BIG[:2000],
        "converted/config.json": b"{}",
        "converted/meta.json": b'{"llama_type": "mixtral"}',
        "converted/tokenizer.model": b"tok",
        "converted/notes.txt": b"n",
        "模型 [v1]/consolidated.safetensors": BIG,
        "模型 [v1]/params.json": b"{}",
        "模型 v/params.json": b"decoy for a pattern with brackets",
        "gguf/a.Q4_1.gguf": BIG,
        "gguf/b.Q8_0.gguf": BIG,
        "gguf/config.json": b"{}",
    }
)
HOSTILE = Repo(
    {
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "../../outside.safetensors"}}).encode(),
        "../../outside.safetensors": BIG,
        "sub/model.safetensors": BIG,
        "sub/../../../escape.json": b"{}",
        "sub/config.json": b"{}",
    }
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    constants = pytest.importorskip("huggingface_hub.constants")
    MIXTRAL.cut_after.clear()
    repos = {
        "who/mixtral": MIXTRAL,
        "who/gated": Repo(MIXTRAL.files, gated=True),
        "who/hostile": HOSTILE,
        "who/empty": Repo({"README.md": b"", "weights/model.safetensors": BIG}),
        "who/gguf": Repo({"only.gguf": BIG, "README.md": b""}),
    }
    with serve(repos) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


def fetch(path: str, tmp_path: Path, **kwargs) -> Path:
    return hub.resolve(path, cache_dir=tmp_path / "cache", progress=False, **kwargs)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_local_path_is_returned_as_it_is(tmp_path):
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_a_local_path_that_is_not_there_mentions_the_spelling(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such file or folder.*hf://owner/name"):
        hub.resolve(tmp_path / "nowhere")


def test_only_one_copy_of_the_weights_is_fetched(server: HubServer, tmp_path):
    folder = fetch("hf://who/mixtral", tmp_path)
    assert names(folder) == {
        "config.json",
        "generation_config.json",
        "params.json",
        "tokenizer.model",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == BIG[::-1]
    assert not [path for path in server.downloads() if path.endswith((".pt", ".bin", ".pth", ".md"))]


def test_a_second_call_downloads_nothing(server: HubServer, tmp_path):
    folder = fetch("hf://who/mixtral", tmp_path)
    server.log.clear()
    assert fetch("hf://who/mixtral", tmp_path) == folder
    assert server.downloads() == []


def test_a_sub_folder(server: HubServer, tmp_path):
    folder = fetch("hf://who/mixtral/converted/", tmp_path)
    assert folder.name == "converted"
    assert names(folder) == {
        "config.json",
        "meta.json",
        "tokenizer.model",
        "consolidated.00-of-02.model.pth",
        "consolidated.01-of-02.model.pth",
    }
    assert all("/converted/" in path for path in server.downloads())


def test_a_folder_whose_name_is_unicode_and_a_pattern(server: HubServer, tmp_path):
    folder = fetch("hf://who/mixtral/模型 [v1]", tmp_path)
    assert names(folder) == {"consolidated.safetensors", "params.json"}
    assert (folder / "params.json").read_bytes() == b"{}"


def test_a_cut_connection_is_resumed_where_it_broke(server: HubServer, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 5_000)
    MIXTRAL.cut_after["model-00001-of-00002.safetensors"] = 20_000
    folder = fetch("hf://who/mixtral", tmp_path)
    assert (folder / "model-00001-of-00002.safetensors").read_bytes() == BIG
    ranges = [r.range for r in server.log if r.method == "GET" and "model-00001" in r.path and "lfs" in r.path]
    assert ranges == [None, "bytes=20000-"]


def test_what_is_cached_serves_without_a_network(server: HubServer, tmp_path, monkeypatch):
    from huggingface_hub import constants

    folder = fetch("hf://who/mixtral/converted", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.log.clear()
    assert fetch("hf://who/mixtral/converted", tmp_path) == folder
    assert server.log == []
    with pytest.raises(CheckpointError, match=r"hf://who/gguf: the Hub cannot be reached and nothing of it"):
        fetch("hf://who/gguf", tmp_path)
    (folder / "consolidated.01-of-02.model.pth").unlink()
    with pytest.raises(CheckpointError, match=r"only part of it .*numbers \[1\] are missing"):
        fetch("hf://who/mixtral/converted", tmp_path)


def test_a_hub_that_does_not_answer(server: HubServer, tmp_path, monkeypatch):
    folder = fetch("hf://who/gguf", tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch("hf://who/gguf", tmp_path) == folder
    with pytest.raises(CheckpointError, match="the Hub cannot be reached and nothing of it is in the cache"):
        fetch("hf://who/mixtral", tmp_path)


def test_gguf_files(server: HubServer, tmp_path):
    assert fetch("hf://who/gguf", tmp_path).name == "only.gguf"
    file = fetch("hf://who/mixtral/gguf/b.Q8_0.gguf", tmp_path)
    assert file.read_bytes() == BIG
    assert names(file.parent) == {"b.Q8_0.gguf"}
    with pytest.raises(CheckpointError, match=r"several \.gguf files, name one of them: a\.Q4_1\.gguf, b\.Q8_0\.gguf"):
        fetch("hf://who/mixtral/gguf", tmp_path)


def test_a_revision_in_either_spelling(server: HubServer, tmp_path):
    sha = MIXTRAL.sha
    folder = fetch(f"hf://who/mixtral/converted@{sha}", tmp_path)
    assert folder == fetch(f"hf://who/mixtral@{sha}/converted", tmp_path)
    assert folder == fetch("hf://who/mixtral/converted", tmp_path, revision=sha)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf://who/nothing", r"hf://who/nothing: no model repository who/nothing"),
        ("hf://who/gated", r"who/gated is gated: accept its terms"),
        ("hf://who/mixtral/convert", r"has no folder 'convert'; its folders are converted, gguf, 模型"),
        ("hf://who/mixtral@v9", r"has no revision 'v9'"),
        ("hf://who/empty", r"no checkpoint among the files of this folder; folders that hold one: weights"),
        ("hf://who/mixtral/README.md", r"README\.md is a file; give its folder"),
        ("hf://who", r"hf://who: not a repository's address, which is spelled hf://owner/name"),
        ("hf://", r"not a repository's address"),
        ("hf://who/mix tral", r"'mix tral' cannot be an owner's or a repository's name"),
        ("hf://who//x", r"'' cannot be an owner's or a repository's name"),
        ("hf://who/mixtral/../x", r"'\.\.' cannot be part of a folder's name"),
        ("hf://who/mixtral/a//b", r"'' cannot be part of a folder's name"),
        ("hf://who/mixtral@", r"no revision after the @"),
        ("hf://who/hostile", r"index\.json names files that are not in its folder: \.\./\.\./outside\.safetensors"),
    ],
)
def test_each_mistake_is_one_clear_line(server: HubServer, tmp_path, path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch(path, tmp_path)
    assert "\n" not in str(caught.value)


def test_two_different_revisions_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="names revision 'a', but revision 'b' was asked for"):
        fetch("hf://who/mixtral@a", tmp_path, revision="b")


def test_names_that_lead_out_of_the_folder_are_never_fetched(server: HubServer, tmp_path):
    folder = fetch("hf://who/hostile/sub", tmp_path)
    assert names(folder) == {"model.safetensors", "config.json"}
    assert not list(tmp_path.rglob("*escape*"))
    assert not list(tmp_path.parent.glob("escape*"))


def test_without_huggingface_hub_the_pip_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mixtral-accessory\[hub\]'"):
        hub.resolve("hf://who/mixtral")


def test_the_environment_of_a_fresh_process_is_honoured(server: HubServer, tmp_path):
    code = "import sys; from accessory.checkpoint.hub import resolve; print(resolve(sys.argv[1]))"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "x",
    }
    run = subprocess.run(
        [sys.executable, "-c", code, "hf://who/gguf"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).read_bytes() == BIG


_PART = st.from_regex(r"[A-Za-z0-9._-]{1,8}", fullmatch=True).filter(lambda p: p not in (".", ".."))


@settings(max_examples=examples(50), deadline=None)
@given(_PART, _PART, st.lists(_PART, max_size=3), st.none() | _PART)
def test_an_address_is_taken_apart_as_it_was_put_together(owner, name, folders, revision):
    tail = f"@{revision}" if revision else ""
    url = "/".join([f"hf://{owner}/{name}", *folders]) + tail
    address = hub.parse(url)
    assert (address.repo, address.folder, address.revision) == (f"{owner}/{name}", "/".join(folders), revision)
    # pathlib turns two slashes into one; an address must survive that.
    assert hub.is_remote(Path(url))
    assert hub.parse(Path(url)).folder == address.folder
