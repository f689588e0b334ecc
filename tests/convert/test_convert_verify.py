"""Equal hashes mean that two folders hold the same model; otherwise the report says how they differ."""

import hashlib

import pytest
import torch
from helpers import checkpoints as make
from helpers.checkpoints import ARGS, random_tensors

from accessory.checkpoint.hashing import is_finite
from accessory.config import LlamaType
from accessory.convert.info import info
from accessory.convert.verify import verify

TENSORS = random_tensors()


def test_the_hash_is_what_it_says(tmp_path):
    """sha256 over sorted lines `name shape dtype sha256-of-bytes`, computed here by hand."""
    lines = ""
    for name in sorted(TENSORS):
        tensor = TENSORS[name]
        content = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        lines += f"{name} {','.join(map(str, tensor.shape))} bfloat16 {content}\n"
    expected = hashlib.sha256(lines.encode()).hexdigest()
    folders = [
        make.write_torrent(tmp_path / "a", TENSORS),
        make.write_hf(tmp_path / "b", TENSORS, fused=True, files=2),
        make.write_accessory(tmp_path / "c", TENSORS, "base", world=2),
        make.write_accessory(tmp_path / "d", TENSORS, "sparse", world=8),
    ]
    for folder in folders:
        report = verify(folder, progress=False)
        assert report.ok
        assert report.hash == expected
        assert report.lines()[-1] == f"whole: {expected}"
        both = verify(folders[0], folder, progress=False)
        assert both.ok
        assert both.lines()[-1] == f"equal: {expected}"


def test_differences_are_named(tmp_path):
    changed = dict(TENSORS)
    name = "layers.1.feed_forward.experts.5.w2.weight"
    changed[name] = changed[name].clone()
    changed[name][0, 0] += 1
    changed["norm.weight"] = changed["norm.weight"].float()
    make.write_torrent(tmp_path / "a", TENSORS)
    make.write_accessory(tmp_path / "b", changed, "sparse", world=2)
    report = verify(tmp_path / "a", tmp_path / "b", progress=False)
    assert not report.ok
    assert report.a.hash != report.b.hash
    text = "\n".join(report.lines())
    assert "dtype differs: norm.weight (1 of 65)" in text
    assert f"content differs: {name} (1 of 64)" in text
    assert "note: dtypes are mixed within this model" in text
    assert report.lines()[-1] == f"NOT equal: {report.a.hash} {report.b.hash}"


def test_models_of_different_sizes(tmp_path):
    small = ARGS.replace(n_layers=1)
    make.write_torrent(tmp_path / "a", TENSORS)
    make.write_torrent(tmp_path / "b", random_tensors(small), small)
    report = verify(tmp_path / "a", tmp_path / "b", progress=False)
    assert not report.ok
    assert any(text.startswith("only in") and "layers.1." in text for text in report.differences)


def test_a_broken_folder_has_no_hash(tmp_path):
    folder = make.write_torrent(tmp_path / "a", TENSORS)
    make.write_json(folder / "params.json", {**make.params_json(), "vocab_size": 7})
    report = verify(folder, progress=False)
    assert not report.ok
    assert report.lines()[-1] == "NOT whole: none"
    assert "vocab_size" in report.lines()[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_finiteness_by_bit_patterns(dtype):
    largest = torch.finfo(dtype).max
    block = torch.tensor([0.0, -0.0, 1.0, -1.0, largest, -largest, torch.finfo(dtype).tiny], dtype=dtype)
    assert is_finite(block)
    assert is_finite(-block)
    for bad in ("inf", "-inf", "nan", "-nan"):
        value = torch.tensor(float(bad.lstrip("-")), dtype=dtype)
        spoilt = block.clone()
        spoilt[3] = -value if bad.startswith("-") else value
        assert not is_finite(spoilt)
    assert is_finite(torch.tensor([], dtype=dtype))


def test_info_of_every_layout(tmp_path):
    make.write_torrent(tmp_path / "a", TENSORS)
    make.write_accessory(tmp_path / "b", TENSORS, "sparse", world=4)
    found = info(tmp_path / "a")
    assert (found.layout, found.shards, found.dtype, found.complete) == ("torrent", 1, "bfloat16", True)
    assert found.args == ARGS.replace(max_seq_len=32768)
    total = sum(t.numel() for t in TENSORS.values())
    unused = sum(t.numel() for n, t in TENSORS.items() if ".experts." in n and int(n.split(".")[4]) >= 2)
    embedding = TENSORS["tok_embeddings.weight"].numel()
    assert found.parameters == (total, total - unused - embedding)
    assert found.nbytes == (tmp_path / "a" / "consolidated.00.pth").stat().st_size
    found = info(tmp_path / "b")
    assert found.llama_type == LlamaType("sparse")
    assert found.shards == 4
    text = "\n".join(found.lines())
    for word in ("sparse", "mixtral_sparse", "num_experts: 8", "complete        yes", "bfloat16"):
        assert word in text
