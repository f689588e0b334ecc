"""Broken, incomplete, contradictory and hostile folders: one clear error that names the file or tensor."""

import json
import os
import pickle
import struct

import pytest
import torch
from helpers import checkpoints as make
from helpers.checkpoints import ARGS, random_tensors
from safetensors.torch import load_file, save_file

from accessory.checkpoint.folder import open_checkpoint
from accessory.convert.info import info
from accessory.convert.verify import verify
from accessory.errors import CheckpointError

TENSORS = random_tensors()


def fails(folder, message: str) -> None:
    """Opening fails with `message` in one line; verify is not ok (the command exits with 1); info says incomplete."""
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    report = verify(folder, progress=False)
    assert not report.ok
    assert report.hash == ""
    assert not info(folder).complete


def edit(path, change) -> None:
    """Load a pickle, let `change` work on its tensors, write it back."""
    content = torch.load(path, weights_only=True)
    change(content.get("model", content))
    torch.save(content, path)


def truncate(path, keep: float) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


class Code:
    def __reduce__(self):
        return os.mkdir, ("/nowhere/at/all",)


@pytest.fixture
def base(tmp_path):
    return make.write_accessory(tmp_path / "c", TENSORS, "base", world=4)


@pytest.fixture
def hf(tmp_path):
    return make.write_hf(tmp_path / "c", TENSORS, files=3)


@pytest.mark.parametrize("keep", [0.001, 0.5, 0.99])
def test_a_truncated_shard(base, keep):
    truncate(base / "consolidated.02-of-04.model.pth", keep)
    fails(base, r"consolidated\.02-of-04\.model\.pth: (truncated|not a checkpoint)")


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_safetensors_file(hf, keep):
    truncate(hf / "model-00002-of-00003.safetensors", keep)
    fails(hf, r"model-00002-of-00003\.safetensors: (truncated|not a )")


def test_a_missing_shard(base):
    (base / "consolidated.01-of-04.model.pth").unlink()
    fails(base, r"missing file consolidated\.01-of-04\.model\.pth \(3 of 4 present\)")
    found = info(base)
    assert found.layout == "base"
    assert found.args == ARGS
    assert found.shards == 4
    assert any("consolidated.01-of-04" in line for line in found.lines())


def test_a_missing_hugging_face_file(hf):
    (hf / "model-00003-of-00003.safetensors").unlink()
    fails(hf, r"missing file model-00003-of-00003\.safetensors")
    (hf / "model.safetensors.index.json").unlink()
    fails(hf, r"missing file model-00003-of-00003\.safetensors")


def test_a_missing_piece(tmp_path):
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    make.split_into_pieces(folder / "consolidated.00.pth", 5)
    (folder / "consolidated.00.pth-split3").unlink()
    fails(folder, r"missing file consolidated\.00\.pth-split3 \(a piece of consolidated\.00\.pth\)")


def test_the_last_piece_missing_is_a_truncation(tmp_path):
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    make.split_into_pieces(folder / "consolidated.00.pth", 5)
    (folder / "consolidated.00.pth-split4").unlink()
    fails(folder, r"consolidated\.00\.pth \(its pieces joined\): truncated")


def test_shards_of_two_checkpoints_mixed(base, tmp_path):
    other = make.write_accessory(tmp_path / "other", random_tensors(seed=1), "base", world=4)
    os.replace(other / "consolidated.03-of-04.model.pth", base / "consolidated.03-of-04.model.pth")
    fails(base, r"consolidated\.03-of-04\.model\.pth: .* differs from that of consolidated\.00.*different checkpoints")


def test_mixed_shards_that_differ_in_a_late_gate_only_are_found_by_verify(tmp_path):
    folder = make.write_accessory(tmp_path / "c", TENSORS, "sparse", world=2)
    edit(
        folder / "consolidated.01-of-02.model.pth",
        lambda t: t["llma.layers.1.feed_forward.gate.weight"][3, 3].add_(1),
    )
    assert open_checkpoint(folder).shards == 2  # quick
    report = verify(folder, progress=False)
    assert not report.ok
    assert "layers.1.feed_forward.gate.weight differs" in report.a.problems[0]


def test_shards_of_two_sizes_mixed(base):
    make.write_accessory(base, TENSORS, "base", world=2)
    fails(base, r"shards of 2 and of 4 lie in one folder")


def test_shards_of_two_shapes_mixed(base, tmp_path):
    wide = ARGS.replace(vocab_size=160)
    other = make.write_accessory(tmp_path / "other", random_tensors(wide), "base", wide, world=4)
    os.replace(other / "consolidated.03-of-04.model.pth", base / "consolidated.03-of-04.model.pth")
    fails(base, r"different checkpoints|do not belong together")


def test_a_missing_tensor(tmp_path):
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    edit(folder / "consolidated.00.pth", lambda t: t.pop("layers.1.attention.wo.weight"))
    fails(folder, r"missing tensors: layers\.1\.attention\.wo\.weight \(1 of 65\)")


def test_a_tensor_missing_from_one_shard(base):
    edit(base / "consolidated.02-of-04.model.pth", lambda t: t.pop("llma.layers.1.attention.wq.weight"))
    fails(base, r"consolidated\.02-of-04\.model\.pth: tensor layers\.1\.attention\.wq\.weight is missing")


def test_an_expert_missing_from_base(base):
    edit(
        base / "consolidated.02-of-04.model.pth",
        lambda t: t.pop("llma.layers.0.feed_forward.experts.4.w2.weight"),
    )
    fails(base, r"missing tensors: layers\.0\.feed_forward\.experts\.4\.w2\.weight")


def test_an_expert_in_two_shards(base):
    name = "llma.layers.0.feed_forward.experts.4.w2.weight"
    edit(base / "consolidated.01-of-04.model.pth", lambda t: t.update({name: torch.zeros(48, 40).bfloat16()}))
    fails(base, r"tensor layers\.0\.feed_forward\.experts\.4\.w2\.weight is also in consolidated\.01-of-04")


@pytest.mark.parametrize("name", ["layers.0.attention.wx.weight", "layers.1.attention_norm.scale", "vision.proj"])
def test_an_extra_tensor(tmp_path, name):
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    edit(folder / "consolidated.00.pth", lambda t: t.update({name: torch.ones(48)}))
    fails(folder, rf"unexpected tensor {name}")


def test_an_extra_tensor_in_other_layouts(base, tmp_path):
    for rank in range(4):
        edit(base / f"consolidated.{rank:02d}-of-04.model.pth", lambda t: t.update({"llma.odd": torch.ones(2)}))
    fails(base, r"unexpected tensor odd \(2,\)")
    folder = make.write_hf(tmp_path / "hf", TENSORS)
    raw = load_file(folder / "model.safetensors") | {"model.layers.0.mlp.up_proj.weight": torch.ones(2)}
    save_file(raw, folder / "model.safetensors")
    fails(folder, r"unexpected tensor model\.layers\.0\.mlp\.up_proj\.weight")


def test_a_misshapen_tensor(tmp_path):
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    edit(folder / "consolidated.00.pth", lambda t: t.update({"layers.1.attention.wv.weight": torch.ones(16, 40)}))
    fails(folder, r"layers\.1\.attention\.wv\.weight: shape \(16, 40\), but the configuration says \(16, 48\)")


def test_a_stack_that_is_none(tmp_path):
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    edit(folder / "consolidated.00.pth", lambda t: t.update({"layers.1.block_sparse_moe.w2": torch.ones(321, 48)}))
    fails(folder, r"layers\.1\.block_sparse_moe\.w2: \(321, 48\) is no stack of 8 experts")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nan_and_infinity(tmp_path, value, dtype):
    folder = make.write_torrent(tmp_path / "c", random_tensors(dtype=dtype))
    assert verify(folder, progress=False).ok
    edit(folder / "consolidated.00.pth", lambda t: t["layers.1.block_sparse_moe.w1"][77, 5].fill_(value))
    report = verify(folder, progress=False)
    assert not report.ok
    assert "layers.1.feed_forward.experts.1.w1.weight" in report.a.problems[0]
    assert report.a.problems[0].startswith("NaN or infinity in")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a checkpoint"),
        (b"hello, this is no tensor at all", "not a checkpoint"),
        (b"PK\x03\x04" + bytes(5000), "truncated|cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (pickle.dumps([1, 2, 3], protocol=2), "expected a dict of named tensors|cannot be read"),
    ],
)
def test_a_file_that_is_no_checkpoint(tmp_path, content, message):
    (tmp_path / "consolidated.00.pth").write_bytes(content)
    fails(tmp_path, rf"consolidated\.00\.pth: .*({message})|({message})")
    (tmp_path / "consolidated.00.pth").rename(tmp_path / "model.safetensors")
    fails(tmp_path, r"model\.safetensors: ")


def test_folders_that_hold_none(tmp_path):
    for path, message in (
        (tmp_path, "no checkpoint in this folder; it holds no files"),
        (tmp_path / "missing", "no such|does not exist"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
        with pytest.raises(CheckpointError, match=message):
            verify(path, progress=False)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"it holds notes\.txt"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        open_checkpoint(tmp_path / "notes.txt")


def test_tensors_of_another_kind_of_model(tmp_path):
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "consolidated.00.pth")
    fails(tmp_path, r"no tensor of a Mixtral in consolidated\.00\.pth; it holds encoder\.weight")


def test_a_pickle_with_code_in_it(base):
    torch.save({"model": {"llma.norm.weight": Code()}}, base / "consolidated.01-of-04.model.pth")
    fails(base, r"consolidated\.01-of-04\.model\.pth: the pickle asks for posix\.mkdir; code .* never run")
    (base / "consolidated.01-of-04.model.pth").write_bytes(pickle.dumps({"a": Code()}, protocol=2))
    fails(base, r"consolidated\.01-of-04\.model\.pth: .*code .* never run")


def test_things_in_a_pickle_that_are_no_tensors(tmp_path):
    torch.save({"norm.weight": "one"}, tmp_path / "consolidated.00.pth")
    fails(tmp_path, r"consolidated\.00\.pth: norm\.weight: expected a tensor, found str")


def test_quantized_tensors_are_named(tmp_path):
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    edit(folder / "consolidated.00.pth", lambda t: t.update({"norm.weight": torch.ones(48, dtype=torch.int8)}))
    fails(folder, r"quantised tensors cannot be read here: norm\.weight int8")


def write_header(path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize(
    ("entry", "data", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, bytes(4), "tensor a: shape .* contradict"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 4]}, bytes(4), "tensor a: shape .* contradict"),
        ({"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}, bytes(8), "tensor a: unusable entry"),
        ({"dtype": "F32", "data_offsets": [0, 8]}, bytes(8), "tensor a: unusable entry"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, bytes(7), "truncated: tensor a ends at byte"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, bytes(9), "1 bytes follow the last tensor"),
        (["F32"], bytes(8), "tensor a: unusable entry"),
    ],
)
def test_safetensors_headers_that_lie(tmp_path, entry, data, message):
    write_header(tmp_path / "model.safetensors", {"a": entry}, data)
    fails(tmp_path, rf"model\.safetensors: .*{message}")


def test_safetensors_headers_that_are_none(tmp_path):
    path = tmp_path / "model.safetensors"
    write_header(path, b"{}", length=2**60)
    fails(tmp_path, r"model\.safetensors: not a safetensors file")
    write_header(path, b"{nonsense")
    fails(tmp_path, r"model\.safetensors: not a safetensors file \(its header is not JSON")
    write_header(path, [1, 2])
    fails(tmp_path, r"model\.safetensors: not a safetensors file")


def test_a_broken_index(hf):
    (hf / "model.safetensors.index.json").write_text('{"weight": 3}')
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: not an index"):
        open_checkpoint(hf)


def test_torchs_old_format_is_read_into_memory(tmp_path, caplog):
    folder = make.write_official(tmp_path / "c", TENSORS)
    torch.save(TENSORS, folder / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(folder)
    assert all(torch.equal(checkpoint.tensors[n].load(), t) for n, t in TENSORS.items())
    assert "old format" in caplog.text
