"""`accessory quantize`, and every other command on its folder, finetuning included."""

import json

import pytest
from helpers.runs import curve, dialogues, finetune, refused, write_data, write_model

from accessory.checkpoint.folder import open_checkpoint
from accessory.cli import main
from accessory.errors import ConfigError
from accessory.formats import Quant
from accessory.train.config import FinetuneConfig
from accessory.train.source import open_source

SIZES = {"dim": 128, "hidden_dim": 128, "head_dim": 32}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model", **SIZES)
    write_data(folder, dialogues())
    return folder


@pytest.fixture(scope="module")
def quantized(inputs):
    plain = ["--quant", "int4", "--no-quant-search"]
    assert main(["quantize", str(inputs / "model"), str(inputs / "int4"), *plain]) == 0
    return inputs / "int4"


def said(capsys, *words):
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def refusal(capsys, *words):
    assert main([str(word) for word in words]) == 1
    err = capsys.readouterr().err
    assert err.startswith("accessory: error: ")
    assert err.count("\n") == 1
    return err


def test_the_folder_is_written_once_and_read_again(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["quantize", inputs / "model", out, "--quant", "nf4", "--quant-attention", "int8", "--quant_output", "nf4"]
    assert said(capsys, *words) == f"{out}: written, read again and equal\n"
    assert open_checkpoint(out).quant == Quant("nf4", "int8", "nf4")
    assert "is not empty; give --overwrite" in refusal(capsys, *words)
    assert said(capsys, *words[:4], "fp8", "--overwrite", "--no-verify") == f"{out}: written\n"
    assert open_checkpoint(out).quant == Quant("fp8", "fp8")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_refused(inputs, quantized, tmp_path, capsys):
    out = tmp_path / "out"
    assert "is quantised already" in refusal(capsys, "quantize", quantized, out, "--quant", "int8")
    assert "nothing is to be quantised" in refusal(capsys, "quantize", inputs / "model", out, "--quant", "none")
    with pytest.raises(SystemExit):
        main(["quantize", str(inputs / "model"), str(out)])
    assert "--quant" in capsys.readouterr().err
    assert not out.exists()


def test_every_command_reads_it(inputs, quantized, tmp_path, capsys):
    about = said(capsys, "info", quantized)
    assert "quantised       experts int4, attention int4\n" in about
    assert "complete        yes" in about
    checked = said(capsys, "verify", quantized)
    assert checked.splitlines()[0].endswith("(32 int4 + 9 float32)")
    assert checked.splitlines()[-1].startswith("whole: ")
    assert main(["convert", str(quantized), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert said(capsys, "verify", quantized, tmp_path / "hf").splitlines()[-1].startswith("equal: ")


def test_it_generates_what_quantizing_while_loading_generates(inputs, quantized, capsys):
    words = ["--prompt", "the cat", "--max-gen-len", "6", "--dtype", "fp32", "--device", "cpu", "--max-seq-len", "64"]
    stored = said(capsys, "generate", quantized, *words)
    assert stored == said(capsys, "generate", inputs / "model", *words, "--quant", "int4")
    assert "is quantised already (experts int4" in refusal(capsys, "generate", quantized, *words, "--quant", "nf4")


@pytest.fixture
def text(inputs):
    """Enough for some rows, in words that the tokenizer knows."""
    path = inputs / "text.txt"
    path.write_text("the cat sat on the mat and the dog ran to the house. " * 400, encoding="utf-8")
    return path


def test_int4_is_searched_for_unless_told_otherwise(inputs, quantized, tmp_path, capsys):
    said(capsys, "quantize", inputs / "model", tmp_path / "searched", "--quant", "int4", "--device", "cpu")
    right = open_checkpoint(inputs / "model").tensors
    errors = []
    for folder in (tmp_path / "searched", quantized):
        tensors = open_checkpoint(folder).tensors
        errors.append(
            sum(float((t.load().float() - right[n].load().float()).square().sum()) for n, t in tensors.items())
        )
    assert 0 < errors[0] < 0.95 * errors[1]


def test_a_text_to_calibrate_on(inputs, quantized, text, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["quantize", inputs / "model", out, "--quant", "int4", "--device", "cpu", "--calibrate", text]
    lines = said(capsys, *words, "--calibrate-tokens", "1024", "--allow-unreached").splitlines()
    assert lines[0].startswith("calibrated on 1024 tokens, of which an expert got ")
    assert lines[-1] == f"{out}: written, read again and equal"
    told = json.loads((out / "calibration.json").read_text())
    args = open_checkpoint(out).args
    assert told["tokens"] == 1024
    assert [sum(layer) for layer in told["tokens_of_experts"]] == [1024 * args.moe.num_experts_per_tok] * args.n_layers
    assert open_checkpoint(out).quant == Quant("int4", "int4")
    assert said(capsys, "verify", out).splitlines()[-1].startswith("whole: ")
    assert "quantised       experts int4, attention int4\n" in said(capsys, "info", out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # no temporary folder is left


def test_what_calibrating_refuses(inputs, text, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["quantize", inputs / "model", out, "--quant", "int4", "--device", "cpu"]
    assert "there is no text; give --calibrate FILE" in refusal(capsys, *words, "--allow-unreached")
    assert "there is no text; give --calibrate FILE" in refusal(capsys, *words, "--calibrate-tokens", "99")
    assert "missing.txt: cannot be read (No such file" in refusal(
        capsys, *words, "--calibrate", tmp_path / "missing.txt"
    )
    (tmp_path / "latin").write_bytes(b"caf\xe9 " * 9)
    assert "latin: cannot be read (is no UTF-8 text)" in refusal(capsys, *words, "--calibrate", tmp_path / "latin")
    (tmp_path / "short").write_text("the cat")
    assert "of one row; give a longer text" in refusal(capsys, *words, "--calibrate", tmp_path / "short")
    few = refusal(capsys, *words, "--calibrate", text, "--calibrate-tokens", "3")
    assert "--calibrate-tokens: got 3, but it must be at least" in few
    words[4] = "nf4"
    said = refusal(capsys, *words, "--calibrate", text, "--calibrate-tokens", "1024")
    assert "quant has none; give --quant int4" in said
    assert not out.exists()


LORA = {"lora_rank": 4, "lora_alpha": 8.0, "max_steps": 3, "only_save_trainable": True, "save_iteration_interval": None}


@pytest.mark.slow
def test_qlora_learns_beside_it_as_beside_quantizing_while_loading(inputs, quantized, tmp_path):
    final = finetune(inputs, tmp_path / "stored", **LORA, pretrained_path=[str(quantized)])
    finetune(inputs, tmp_path / "loaded", **LORA, quant="int4")
    assert curve(tmp_path / "stored") == curve(tmp_path / "loaded")
    assert len(curve(tmp_path / "stored")) == 3
    adapter = open_checkpoint(final, allow_partial=True)
    assert adapter.quant is None
    assert any(t.load().any() for n, t in adapter.tensors.items() if n.endswith("lora_b.weight"))


@pytest.mark.parametrize(
    ("chosen", "quant"),
    [
        ({"quant": "nf4-dq", "quant_attention": "int8", "quant_output": "nf4"}, Quant("nf4-dq", "int8", "nf4")),
        ({"quant": "int8", "quant_attention": "none", "quant_output": "none"}, Quant("int8")),
        ({"quant_attention": "int8"}, Quant(attention="int8")),
    ],
    ids=str,
)
def test_finetuning_chooses_part_by_part(inputs, tmp_path, chosen, quant):
    where = {"pretrained_path": [inputs / "model"], "data_config": "unread", "output_dir": tmp_path}
    source = open_source(FinetuneConfig(**where, **chosen, lora_rank=4))
    assert source.quant == quant
    assert source.identity()["quant"] == quant.to_dict()
    with pytest.raises(ConfigError, match=f"quant: got {quant}, but quantised weights cannot be trained"):
        open_source(FinetuneConfig(**where, **chosen))


def test_training_all_of_it_is_refused(inputs, quantized, tmp_path):
    words = (f"quant: {quantized} is quantised, but quantised weights cannot be trained; set lora_rank",)
    refused(inputs, tmp_path / "out", *words, pretrained_path=[str(quantized)])
    changes = {"pretrained_path": [str(quantized)], "quant": "nf4", "lora_rank": 4}
    refused(inputs, tmp_path / "out", "is quantised already (experts int4", **changes)
