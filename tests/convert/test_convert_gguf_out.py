"""Mixtures as GGUF files: names, shapes, metadata and values against the gguf package's reader and dequantiser."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import checkpoints as make
from helpers.small_tokenizers import CHATML, byte_level_folder
from torch import Tensor

from accessory import cli
from accessory.checkpoint.folder import open_checkpoint
from accessory.commands import checkpoint_options
from accessory.config import ModelArgs, MoEArgs
from accessory.convert.convert import convert
from accessory.convert.gguf import GGUF_TYPES
from accessory.convert.info import info
from accessory.convert.verify import verify
from accessory.data.tokenizer import load_tokenizer
from accessory.errors import AccessoryError, CheckpointError, ConfigError, MissingExtraError
from accessory.formats import Quant

gguf = pytest.importorskip("gguf")

E, V = 4, 352
ARGS = ModelArgs(
    dim=64,
    hidden_dim=96,
    head_dim=8,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=V,
    max_seq_len=128,
    rope_theta=1e6,
    norm_eps=2e-5,
    moe=MoEArgs(num_experts=E, num_experts_per_tok=3),
)
TENSORS = make.random_tensors(ARGS)
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
TEXTS = ["Hello world, hello there!", "  two  spaces", "Größe, 你好 and 🙂", "don't stop\nat 12345"]


@pytest.fixture
def source(tmp_path):
    folder = make.write_hf(tmp_path / "source", TENSORS, ARGS)
    return byte_level_folder(folder)


def write(source: Path, dst: Path, type: str | None = "bf16", **options) -> Path:
    convert(source, dst, to="gguf", type=type, progress=False, **options)
    return dst


def permuted(weight: Tensor, heads: int) -> Tensor:
    """`LlamaModel.permute` of llama.cpp's converter: from Hugging Face's order of rows to GGUF's."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def expected() -> dict[str, Tensor]:
    """llama.cpp's names, and what its converter makes of the tensors of a Hugging Face folder."""
    theirs = make.hf_tensors(TENSORS, ARGS)
    out = {
        "token_embd.weight": theirs["model.embed_tokens.weight"],
        "output_norm.weight": theirs["model.norm.weight"],
        "output.weight": theirs["lm_head.weight"],
    }
    for i in range(ARGS.n_layers):
        layer = f"model.layers.{i}."
        names = {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate_inp": "block_sparse_moe.gate",
        }
        out |= {f"blk.{i}.{ours}.weight": theirs[f"{layer}{name}.weight"] for ours, name in names.items()}
        for ours, name, heads in (("attn_q", "q_proj", ARGS.n_heads), ("attn_k", "k_proj", ARGS.n_kv_heads)):
            out[f"blk.{i}.{ours}.weight"] = permuted(theirs[f"{layer}self_attn.{name}.weight"], heads)
        for ours, name in (("ffn_gate_exps", "w1"), ("ffn_down_exps", "w2"), ("ffn_up_exps", "w3")):
            experts = [theirs[f"{layer}block_sparse_moe.experts.{e}.{name}.weight"] for e in range(E)]
            out[f"blk.{i}.{ours}.weight"] = torch.stack(experts)
    return out


def value(field) -> object:
    return field.contents()


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0"])
def test_tensors_are_those_of_llama_cpps_converter(source, tmp_path, type):
    reader = gguf.GGUFReader(write(source, tmp_path / "m.gguf", type))
    wanted = expected()
    assert {t.name for t in reader.tensors} == set(wanted)
    for tensor in reader.tensors:
        plain = tensor.name.endswith(("norm.weight", "ffn_gate_inp.weight"))
        assert tensor.tensor_type.name == ("F32" if plain else type.upper()), tensor.name
        assert tuple(tensor.shape[::-1]) == tuple(wanted[tensor.name].shape)
        given = wanted[tensor.name].float()
        blocks = gguf.quantize(given.numpy(), tensor.tensor_type)
        np.testing.assert_array_equal(tensor.data.view(np.uint8).ravel(), blocks.view(np.uint8).ravel(), tensor.name)
        if tensor.tensor_type.name == "Q8_0":  # half a step of a block's 127 steps, and the step itself in fp16
            read = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).view(-1, 32)
            largest = given.view(-1, 32).abs().amax(1, keepdim=True)
            assert ((read - given.view(-1, 32)).abs() <= largest * (0.5 / 127 + 2**-11)).all()


def test_metadata_is_that_of_llama_cpps_converter(source, tmp_path):
    fields = gguf.GGUFReader(write(source, tmp_path / "m.gguf", "q8_0")).fields
    keys, arch = gguf.Keys, "llama"
    wanted = {
        keys.General.ARCHITECTURE: arch,
        keys.General.TYPE: "model",
        keys.General.NAME: "source",
        keys.General.FILE_TYPE: gguf.LlamaFileType.MOSTLY_Q8_0,
        keys.General.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
        keys.LLM.VOCAB_SIZE: V,
        keys.LLM.CONTEXT_LENGTH: 128,
        keys.LLM.EMBEDDING_LENGTH: 64,
        keys.LLM.BLOCK_COUNT: 2,
        keys.LLM.FEED_FORWARD_LENGTH: 96,
        keys.LLM.EXPERT_COUNT: E,
        keys.LLM.EXPERT_USED_COUNT: 3,
        keys.Attention.HEAD_COUNT: 4,
        keys.Attention.HEAD_COUNT_KV: 2,
        keys.Attention.KEY_LENGTH: 8,
        keys.Attention.VALUE_LENGTH: 8,
        keys.Attention.LAYERNORM_RMS_EPS: pytest.approx(2e-5),
        keys.Rope.DIMENSION_COUNT: 8,
        keys.Rope.FREQ_BASE: 1e6,
        keys.Tokenizer.MODEL: "gpt2",
        keys.Tokenizer.PRE: "gpt-2",
        keys.Tokenizer.BOS_ID: 1,
        keys.Tokenizer.EOS_ID: 2,
        keys.Tokenizer.ADD_BOS: False,
        keys.Tokenizer.CHAT_TEMPLATE: CHATML,
    }
    found = {key.format(arch=arch): value(fields[key.format(arch=arch)]) for key in wanted}
    assert found == {key.format(arch=arch): content for key, content in wanted.items()}
    vocab = json.loads((source / "tokenizer.json").read_text())
    size = len(vocab["model"]["vocab"]) + 1  # <tool>
    tokens = value(fields[keys.Tokenizer.LIST])
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokens[size - 1] == "<tool>"
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, V)]
    types = value(fields[keys.Tokenizer.TOKEN_TYPE])
    kinds = gguf.TokenType
    assert (types[:4], types[size - 1], set(types[size:])) == (
        [kinds.CONTROL] * 3 + [kinds.NORMAL],
        kinds.USER_DEFINED,
        {kinds.UNUSED},
    )
    assert value(fields[keys.Tokenizer.MERGES]) == [" ".join(pair) for pair in vocab["model"]["merges"]]


@pytest.mark.parametrize("layout", ["base", "sparse", "torrent", "official"])
def test_every_layout_gives_the_same_tensors(source, tmp_path, layout):
    if layout == "official":
        other = make.write_official(tmp_path / layout, TENSORS, ARGS)
    elif layout == "torrent":
        other = make.write_torrent(tmp_path / layout, TENSORS, ARGS)
    else:
        other = make.write_accessory(tmp_path / layout, TENSORS, layout, ARGS, world=2)
    byte_level_folder(other)
    readers = [gguf.GGUFReader(write(folder, tmp_path / f"{folder.name}.gguf", None)) for folder in (source, other)]
    ours, theirs = ({t.name: t.data.tobytes() for t in reader.tensors} for reader in readers)
    assert ours == theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0"])
def test_verify_proves_a_file_equal_to_its_source(tmp_path, type, dtype):
    tensors = {name: t.to(dtype) for name, t in make.random_tensors(ARGS, dtype=torch.float32).items()}
    source = byte_level_folder(make.write_torrent(tmp_path / "source", tensors, ARGS))
    file = write(source, tmp_path / "m.gguf", type)
    report = verify(source, file, progress=False)
    assert report.ok, report.lines()
    assert f"hashed, are its values as a GGUF file of {type.upper()} holds them" in "\n".join(report.lines())
    assert report.hash == verify(file, progress=False).hash == verify(file, source, progress=False).hash
    if type in DTYPES:  # the hash of the source, cast
        convert(source, tmp_path / "cast", to="base", dtype=DTYPES[type], progress=False)
        assert verify(tmp_path / "cast", progress=False).hash == report.hash
    if DTYPES.get(type) == dtype:
        assert verify(source, progress=False).hash == report.hash


def test_verify_finds_one_number_that_differs(source, tmp_path):
    file = write(source, tmp_path / "m.gguf", "q8_0")
    with open(file, "r+b") as handle:
        entry = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_down_exps.weight")
        handle.seek(int(entry.data_offset) + entry.data.nbytes - 1)  # the last number of the last expert
        handle.write(bytes([int(entry.data.ravel()[-1]) ^ 8]))
    report = verify(source, file, progress=False)
    assert report.differences == ["content differs: layers.1.feed_forward.experts.3.w2.weight (1 of 41)"]


def test_a_folder_gets_model_gguf_and_info_reads_it(source, tmp_path, capsys):
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--to", "gguf", "--type", "f16"]) == 0
    assert "out: written, read again and equal" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.gguf"]
    found = info(tmp_path / "out")
    assert (found.layout, found.dtype, found.complete, found.args) == ("gguf", "float16", True, ARGS)
    write(source, tmp_path / "out", overwrite=True)
    assert info(tmp_path / "out" / "model.gguf").dtype == "bfloat16"


def test_a_file_can_be_written_in_another_layout_again(source, tmp_path):
    file = write(source, tmp_path / "m.gguf", "bf16")
    convert(file, tmp_path / "again", to="hf", progress=False)
    assert verify(source, tmp_path / "again", progress=False).ok
    ours, theirs = load_tokenizer(source), load_tokenizer(tmp_path / "again")
    assert [ours.encode(t, True) for t in TEXTS] == [theirs.encode(t, True) for t in TEXTS]
    assert theirs.chat_template == CHATML
    with pytest.raises(CheckpointError, match=r"m\.gguf: is a GGUF file; write it in another layout first: accessory"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    "scaling",
    [
        2.0,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)
def test_rotary_scalings_come_back(source, tmp_path, scaling):
    config = json.loads((source / "config.json").read_text())
    make.write_json(source / "config.json", config | {"rope_scaling": scaling})
    wanted = open_checkpoint(source).args.rope_scaling
    assert info(write(source, tmp_path / "m.gguf")).args.rope_scaling == wanted


def test_a_rotary_scaling_that_gguf_cannot_say_is_refused(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    scaling = {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}
    make.write_json(source / "config.json", config | {"rope_scaling": scaling})
    with pytest.raises(ConfigError, match="rope_scaling: mscale: GGUF cannot say it"):
        write(source, tmp_path / "m.gguf")


# --------------------------------------------------------------------------- refused


def quantised(source: Path) -> None:
    from accessory.convert.quantize import quantize_checkpoint

    whole = source.rename(source.with_name("whole"))
    quantize_checkpoint(whole, source, Quant("int8"), progress=False)


def of_images(source: Path) -> None:
    make.write_json(source / "meta.json", {"llama_type": "mixtral_ens"})


def no_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").unlink()


def odd(source: Path) -> None:
    args = ARGS.replace(hidden_dim=80)
    make.write_hf(source, make.random_tensors(args), args)


def nothing(source: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (nothing, {"type": "q4_0"}, "type: got 'q4_0', but it must be one of f16, bf16, q8_0"),
        (nothing, {"to": "base"}, "type: got 'q8_0', but only gguf has types"),
        (nothing, {"dtype": torch.float16}, "dtype: does not apply to gguf"),
        (nothing, {"shards": 2}, "shards: does not apply to gguf"),
        (quantised, {}, r"source: is quantised \(.*int8.*\); give the folder that it was made from"),
        (of_images, {}, "source: takes images"),
        (no_tokenizer, {}, "source: no tokenizer in this folder"),
        (odd, {}, r"type: q8_0 scales 32 numbers together, and layers\.0\..*w2\.weight has rows of 80; give f16"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(source, tmp_path, prepare, options, message):
    prepare(source)
    before = sorted(p.name for p in tmp_path.iterdir())
    given = {"to": "gguf", "type": "q8_0", **options}
    with pytest.raises(AccessoryError, match=message) as caught:
        convert(source, tmp_path / "m.gguf", progress=False, **given)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_destination_in_use_is_refused(source, tmp_path):
    file, folder = tmp_path / "m.gguf", tmp_path / "d.gguf"
    file.write_text("mine")
    folder.mkdir()
    for dst, overwrite, message in (
        (file, False, r"m\.gguf: exists; give --overwrite"),
        (file, True, r"m\.gguf: is no GGUF file and is not replaced"),
        (folder, True, r"d\.gguf: is a folder; give a file"),
        (source, True, "source: is the source itself"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write(source, dst, overwrite=overwrite)
    assert file.read_text() == "mine"
    file.unlink()
    write(source, file, "f16")
    write(source, file, "bf16", overwrite=True)
    assert info(file).dtype == "bfloat16"


def test_the_command_line_refuses_what_python_does(source, tmp_path, capsys):
    assert checkpoint_options.GGUF_TYPES == GGUF_TYPES
    for words, message in (
        (["--to", "hf", "--type", "f16"], "type: got 'f16', but only gguf has types"),
        (["--to", "gguf", "--safetensors"], "safetensors: does not apply to gguf"),
    ):
        assert cli.main(["convert", str(source), str(tmp_path / "m.gguf"), *words]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_without_the_package_the_pip_line_is_named(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mixtral-accessory\[gguf\]'"):
        write(source, tmp_path / "m.gguf")


def test_a_failing_write_leaves_nothing(source, tmp_path, monkeypatch):
    from accessory.checkpoint import save

    def failing(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "_write_at", failing)
    with pytest.raises(CheckpointError, match=r"m\.gguf: cannot be written \(No space left on device\)"):
        write(source, tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_leftovers_of_a_killed_run_are_removed(source, tmp_path):
    left = tmp_path / "m.gguf.partial"
    left.mkdir()
    (left / ".writing").touch()
    (left / "m.gguf").write_bytes(b"GGUF")
    write(source, tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "source"]


def test_another_model_of_odd_sizes_is_told_apart(source, tmp_path):
    file = write(source, tmp_path / "m.gguf", "q8_0")
    odd(source)
    report = verify(source, file, progress=False)
    assert not report.ok
    assert any(text.startswith("shape differs: ") for text in report.differences)


def test_what_was_written_wrongly_is_found(source, tmp_path, monkeypatch):
    from accessory.checkpoint import save

    real = save._write_at
    monkeypatch.setattr(save, "_write_at", lambda handle, data, at: real(handle, memoryview(bytes(len(data))), at))
    with pytest.raises(CheckpointError, match="reads back differently"):
        write(source, tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_metadata_that_the_tensors_contradict_are_named(source, tmp_path):
    file = write(source, tmp_path / "m.gguf")
    field = gguf.GGUFReader(file, "r+").fields["llama.block_count"]
    whole = file.read_bytes()
    for layers, message in (
        (2**31, "2147483648 layers of 4 experts, which 41 tensors are not"),
        (3, "missing tensor"),
    ):
        at = int(field.offset) + len(whole[field.offset :].split(b"count", 1)[0]) + len("count") + 4
        file.write_bytes(whole[:at] + layers.to_bytes(4, "little") + whole[at + 4 :])
        assert message in " ".join(verify(file, progress=False).a.problems)


@pytest.mark.parametrize("cut", [100, 3000, -1])
def test_a_file_that_is_broken_off_is_named(source, tmp_path, cut):
    file = write(source, tmp_path / "m.gguf")
    file.write_bytes(file.read_bytes()[:cut])
    assert [p for p in verify(file, progress=False).a.problems if p.startswith("truncated: ")]
