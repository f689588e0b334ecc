"""`accessory merge` and `accessory adapter` from the command line."""

import json

import pytest
import torch
from helpers import checkpoints as make
from helpers.adapters import peft_args, random_adapter, save_adapter
from helpers.checkpoints import random_tensors

from accessory.checkpoint.folder import open_checkpoint
from accessory.cli import main


@pytest.fixture
def base(tmp_path):
    tensors = {n: t * 0.1 if t.dim() == 2 else 1 + t * 0.1 for n, t in random_tensors(dtype=torch.float32).items()}
    return make.write_accessory(tmp_path / "base", {n: t.bfloat16() for n, t in tensors.items()}, "base", world=2)


@pytest.fixture
def adapter(tmp_path):
    tensors = random_adapter()
    tensors["layers.0.feed_forward.experts.2.w1.lora_b.weight"].zero_()
    tensors["layers.0.feed_forward.experts.2.w2.lora_b.weight"].zero_()
    tensors["layers.0.feed_forward.experts.2.w3.lora_b.weight"].zero_()
    return save_adapter(tmp_path / "adapter", tensors, peft_args(norm_tuning=False), to="sparse", shards=2)


def test_merging(tmp_path, base, adapter, capsys):
    out = tmp_path / "out"
    assert main(["merge", str(base), str(adapter), str(out), "--to", "hf", "--dtype", "fp32"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("layers.0: 25 of 28 weights changed")
    assert said[0].endswith("unchanged experts: 2")
    assert any(line.startswith("certificate: 128 random tokens") for line in said)
    assert said[-1] == f"{out}: written, read again and equal"
    opened = open_checkpoint(out)
    assert (opened.layout, opened.dtype) == ("hf", torch.float32)
    assert main(["merge", str(base), str(adapter), str(out)]) == 1
    assert "is not empty; give --overwrite" in capsys.readouterr().err
    quick = ["--overwrite", "--no-certificate", "--no-verify", "--to", "sparse", "--shards", "4", "--safetensors"]
    assert main(["merge", str(base), str(adapter), str(out), *quick]) == 0
    said = capsys.readouterr().out
    assert "certificate" not in said
    assert said.endswith(f"{out}: written\n")
    assert (open_checkpoint(out).layout, open_checkpoint(out).shards) == ("sparse", 4)


def test_what_is_refused_is_one_line(tmp_path, base, adapter, capsys):
    assert main(["merge", str(base), str(tmp_path / "out")]) == 1
    assert "accessory: error: " in (said := capsys.readouterr().err)
    assert "no adapter: nothing stands beside a weight" in said
    nothing = {n: torch.zeros_like(t) if "lora_b" in n else t for n, t in random_adapter().items()}
    nothing = save_adapter(tmp_path / "nothing", nothing, peft_args())
    assert main(["merge", str(base), str(nothing), str(tmp_path / "out")]) == 1
    assert "--allow-unchanged merges it all the same" in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["merge", str(base), str(nothing), str(tmp_path / "out"), "--allow-unchanged"]) == 0
    with pytest.raises(SystemExit):
        main(["merge", str(base)])


def test_to_peft_and_back(tmp_path, base, adapter, capsys):
    peft, back = tmp_path / "peft", tmp_path / "back"
    assert main(["adapter", "export", str(adapter), str(peft), "--base", str(base)]) == 0
    said = capsys.readouterr().out
    assert said == f"LoRA of rank 4, scaled by 1.5, beside wq, wk, wv, wo, w1, w2, w3\n{peft}: written\n"
    more = ["--base", str(base), "--to", "sparse", "--shards", "2", "--safetensors"]
    assert main(["adapter", "import", str(peft), str(back), *more]) == 0
    one, other = (open_checkpoint(folder, allow_partial=True) for folder in (adapter, back))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[n].load(), other.tensors[n].load()) for n in one.tensors)
    assert one.args == other.args
    assert [f.suffix for f in other.files] == [".safetensors"] * 2
    assert main(["merge", str(base), str(peft), str(tmp_path / "no")]) == 1
    assert "bring it in with `accessory adapter import`" in capsys.readouterr().err
    assert main(["adapter", "export", str(adapter), str(tmp_path / "no"), *more]) == 1
    assert "--to: is for import" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["adapter", "export", str(adapter), str(tmp_path / "no")])


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "A", "--prompt", "x"],
        ["chat", "A"],
        ["verify", "A"],
        ["verify", "M", "A"],
        ["convert", "A", "OUT", "--to", "hf"],
        ["quantize", "A", "OUT", "--quant", "int8"],
        ["merge", "A", "OUT"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("known", [True, False], ids=["known", "old"])
def test_an_adapter_alone_is_called_one(tmp_path, base, adapter, capsys, command, known):
    model = "MODEL"
    if known:
        model, meta = str(base), json.loads((adapter / "meta.json").read_text())
        (adapter / "meta.json").write_text(json.dumps(meta | {"trained_on": {"name": model, "hash": "0" * 64}}))
    places = {"A": str(adapter), "M": str(base), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in command]) == 1
    said = capsys.readouterr().err
    assert f"{adapter}: is an adapter (LoRA of rank 4, " in said
    assert (f"trained on {base})" in said) == known
    assert f"`accessory generate {model} {adapter}`" in said
    assert f"`accessory merge {model} {adapter} DST`" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_info_of_an_adapter(base, adapter, capsys):
    tensors = open_checkpoint(adapter, allow_partial=True).tensors.values()
    count = sum(torch.Size(t.shape).numel() for t in tensors)
    assert main(["info", str(adapter)]) == 0
    said = capsys.readouterr().out
    assert f"adapter         LoRA of rank 4, {count / 1e3:.4g} k parameters\n" in said
    assert "missing" not in said
    assert "complete" not in said
    assert f"use it          accessory generate MODEL {adapter}\n" in said
    meta = json.loads((adapter / "meta.json").read_text())
    (adapter / "meta.json").write_text(json.dumps(meta | {"trained_on": {"name": "a b + c", "hash": "0" * 64}}))
    assert main(["info", str(adapter)]) == 0
    said = capsys.readouterr().out
    assert f"k parameters, trained on a b + c\nhash            {'0' * 64} (" in said
    assert f"merge it        accessory merge 'a b' c {adapter} DST\n" in said


@pytest.mark.parametrize(
    "command", [["info"], ["generate", "--prompt", "x"], ["verify"], ["convert", "--to", "hf", "OUT"]]
)
def test_a_folder_of_models_names_them(tmp_path, base, adapter, capsys, command):
    (tmp_path / "other").mkdir()
    rest = [str(tmp_path / "out") if word == "OUT" else word for word in command[1:]]
    assert main([command[0], str(tmp_path), *rest]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path}: no checkpoint in this folder, but below it; give one of {adapter}, {base}\n" in said


def test_a_pefts_folder_is_called_one(tmp_path, base, adapter, capsys):
    assert main(["adapter", "export", str(adapter), str(tmp_path / "peft"), "--base", str(base)]) == 0
    for command in (["info"], ["convert", str(tmp_path / "out"), "--to", "hf"], ["generate", "--prompt", "x"]):
        capsys.readouterr()
        assert main([command[0], str(tmp_path / "peft"), *command[1:]]) == 1
        assert "peft: is a PEFT adapter; bring it in with `accessory adapter import` first\n" in capsys.readouterr().err
