"""Quantised folders: their contents, their use, and that they load the same as quantising while loading."""

import json
import logging
from itertools import product

import pytest
import torch
from helpers import checkpoints as make
from helpers.adapters import peft_args, random_adapter, save_adapter
from helpers.distributed import run_ranks
from helpers.quantized import (
    ARGS,
    CHOICES,
    EXPERT,
    FORMAT_AND_IMPLEMENTATION,
    QUANTS,
    half_tensors,
    write_quantized,
    write_source,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from accessory.build.network import NetworkSpec, build
from accessory.checkpoint.folder import open_checkpoint
from accessory.checkpoint.lazy import Constant, Stored
from accessory.checkpoint.packed import Quantized
from accessory.checkpoint.save import write_folder
from accessory.convert.convert import convert
from accessory.convert.info import info
from accessory.convert.merge import merge
from accessory.convert.quantize import FILE_BYTES, plan_quantized, quantize_checkpoint, quantized_tensors
from accessory.convert.verify import verify
from accessory.errors import CheckpointError, ConfigError
from accessory.formats import FORMATS, Quant
from accessory.model.meta import MetaModel
from accessory.ops.quantized import dequantize, quantize
from accessory.parallel.mesh import DeviceMesh

IMPLEMENTATIONS = ("base", "sparse")


@pytest.fixture(scope="module")
def tensors():
    return half_tensors()


@pytest.fixture(scope="module")
def source(tensors, tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"), tensors)


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory):
    return write_quantized(source, tmp_path_factory.mktemp("quantised"))


def rounded(tensors, quant):
    """Each tensor after quantising and dequantising, in the embedding's dtype."""
    return {
        name: dequantize(quantize(t, quant.format_of(name)), torch.bfloat16) if quant.format_of(name) else t
        for name, t in tensors.items()
    }


def load(folder, implementation, quant=None, ranks=None):
    checkpoint = open_checkpoint(folder)
    spec = NetworkSpec(
        checkpoints=[checkpoint],
        args=checkpoint.args,
        implementation=implementation,
        quant=quant or checkpoint.quant,
    )
    return build(spec, DeviceMesh(model=ranks), dtype=torch.float32)


def same_bytes(a, b):
    one, other = dict(a.named_parameters()), dict(b.named_parameters())
    assert one.keys() == other.keys()
    return all(torch.equal(p.view(torch.uint8), other[n].view(torch.uint8)) for n, p in one.items())


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_folder_holds(folders, source, tensors, format):
    """The safetensors package finds each weight's pieces under its name, and every other tensor unchanged."""
    folder, quant = folders / format, QUANTS[format]
    stored = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if quant.format_of(name) is None:
            assert torch.equal(stored.pop(name), tensor), name
            continue
        for piece, part in quantize(tensor, quant.format_of(name)).tensors().items():
            found = stored.pop(f"{name}.{piece}")
            assert found.dtype == part.dtype
            assert torch.equal(found.view(torch.uint8), part.view(torch.uint8)), name
    assert not stored
    config = json.loads((folder / "config.json").read_text())
    said = {"format_version": 1, "experts": format, "attention": quant.attention, "output": quant.output}
    assert config.pop("quantization") == said
    assert config == json.loads(json.dumps(ARGS.to_dict(), default=dict))
    assert json.loads((folder / "meta.json").read_text()) == {"llama_type": "mixtral_sparse"}
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "meta.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


@FORMAT_AND_IMPLEMENTATION
def test_loading_gives_the_bytes_of_quantizing_while_loading(folders, source, format, implementation):
    assert same_bytes(load(folders / format, implementation), load(source, implementation, QUANTS[format]))


@pytest.mark.parametrize("to", ["base", "sparse", "hf", "torrent"])
def test_every_layout_is_quantized_alike(folders, source, tmp_path, to):
    convert(source, tmp_path / to, to=to, progress=False)
    quantize_checkpoint(tmp_path / to, tmp_path / "out", QUANTS["int4"], search=False, progress=False)
    one, other = (load_file(f / "model.safetensors") for f in (folders / "int4", tmp_path / "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(t.view(torch.uint8), other[n].view(torch.uint8)) for n, t in one.items())


def written(source, folders, formats, group=None):
    """The text that a model of the stored folder writes; its weights have the bytes of quantising the original."""
    out = {}
    for format, implementation in product(formats, IMPLEMENTATIONS):
        kind = "mixtral_sparse" if implementation == "sparse" else "mixtral"
        options = {"mp_group": group, "dtype": torch.float32, "device": "cpu", "max_seq_len": 64}
        stored = MetaModel.from_pretrained(folders / format, kind, **options)
        loaded = MetaModel.from_pretrained(source, kind, quant=format, quant_attention=CHOICES[format], **options)
        assert same_bytes(stored.llma, loaded.llma), (format, implementation)
        out[format, implementation] = stored.generate(["the cat sat"], max_gen_len=8)
    return out


def on_ranks(rank, world, *given):
    import torch.distributed as dist

    return written(*given, dist.group.WORLD)


@pytest.mark.parametrize(
    ("world", "formats"),
    [
        (2, ("int4", "nf4")),
        pytest.param(2, FORMATS, marks=pytest.mark.slow),
        pytest.param(4, ("int4", "nf4"), marks=pytest.mark.slow),
    ],
)
def test_ranks_hold_slices_and_write_the_same_text(folders, source, world, formats):
    alone = written(source, folders, formats)
    assert len(set(map(tuple, alone.values()))) > 1  # the formats round differently
    for texts in run_ranks(on_ranks, world, source, folders, formats):
        assert texts == alone


@FORMAT_AND_IMPLEMENTATION
def test_a_rank_reads_its_slice_alone(folders, monkeypatch, format, implementation):
    from accessory.parallel.mesh import Ranks

    read, own = [], Stored.load

    def counted(self):
        read.append(self.nbytes)
        return own(self)

    checkpoint = open_checkpoint(folders / format)
    monkeypatch.setattr(Stored, "load", counted)
    spec = NetworkSpec(checkpoints=[checkpoint], args=ARGS, implementation=implementation, quant=checkpoint.quant)
    decoder = build(spec, DeviceMesh(model=Ranks(None, 1, 4)), dtype=torch.bfloat16)
    assert sum(read) == sum(p.nbytes for p in decoder.parameters())


def test_a_size_that_ranks_cut_through_a_group_is_an_error(source, tmp_path, tensors):
    from accessory.parallel.mesh import Ranks

    quantize_checkpoint(source, tmp_path / "out", Quant("int4"), progress=False)
    with pytest.raises(ConfigError, match=r"experts\.w2: quant: int4 scales 128 numbers together, so 64"):
        load(tmp_path / "out", "sparse", ranks=Ranks(None, 1, 8))


def test_another_quant_than_the_folders_is_refused(folders):
    for other in ({"quant": "nf4"}, {"quant": "int4"}, {"quant_attention": "int8"}, {"quant": True}):
        with pytest.raises(ConfigError) as error:
            MetaModel.from_pretrained(folders / "int4", device="cpu", **other)
        assert "is quantised already (experts int4, attention int8)" in str(error.value)
        assert "leave quant out" in str(error.value)
        assert "\n" not in str(error.value)
    MetaModel.from_pretrained(folders / "int4", device="cpu", quant="int4", quant_attention="int8")
    MetaModel.from_pretrained(folders / "int4", device="cpu", quant="none")


@pytest.mark.parametrize("to", ["base", "sparse", "hf", "torrent"])
def test_converting_writes_what_the_numbers_mean(folders, tensors, tmp_path, to, caplog):
    with caplog.at_level(logging.WARNING):
        convert(folders / "int4", tmp_path / to, to=to, progress=False)
    assert "is quantised (experts int4, attention int8): written is what its numbers mean, bfloat16" in caplog.text
    opened = open_checkpoint(tmp_path / to)
    assert opened.quant is None
    for name, tensor in rounded(tensors, QUANTS["int4"]).items():
        assert torch.equal(opened.tensors[name].load(), tensor), name
    report = verify(folders / "int4", tmp_path / to, progress=False)
    assert report.ok, report.lines()


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_cuts_are_cuts_of_what_it_means(data):
    """Any chain of cuts along both dimensions and transposes, also through groups."""
    format = data.draw(st.sampled_from(FORMATS))
    weight = torch.randn(6, 384, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, format)
    lazy = Quantized(format, {n: Constant(t) for n, t in packed.tensors().items()}, torch.float32)
    want = dequantize(packed)
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            lazy, want = lazy.t(), want.t()
        dim = data.draw(st.integers(0, 1))
        start = data.draw(st.integers(0, want.shape[dim]))
        length = data.draw(st.integers(0, want.shape[dim] - start))
        lazy, want = lazy.narrow(dim, start, length), want.narrow(dim, start, length)
    out = torch.empty(want.shape)
    lazy.copy_to(out)
    assert torch.equal(out, want)
    assert torch.equal(lazy.load(), want)
    assert torch.equal(torch.cat([*map(torch.clone, lazy.blocks(4096)), torch.empty(0)]).view(want.shape), want)


def test_several_files_and_their_index(source, tmp_path):
    opened = open_checkpoint(source)
    assert FILE_BYTES == 5e9
    tensors = quantized_tensors(opened.tensors, QUANTS["nf4"])
    plan = plan_quantized(tensors, ARGS, opened.llama_type, QUANTS["nf4"], file_bytes=10**6)
    write_folder(tmp_path / "out", tensors, plan, progress=False)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert max(sum(t.nbytes for t in load_file(f).values()) for f in files) <= 10**6
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(f).values())
    assert same_bytes(load(tmp_path / "out", "base"), load(source, "base", QUANTS["nf4"]))
    files[1].unlink()
    with pytest.raises(CheckpointError, match=f"missing file {files[1].name}"):
        open_checkpoint(tmp_path / "out")


def test_info_says_formats_and_bytes(folders):
    lines = info(folders / "int4").lines()
    assert "layout          quantized" in lines
    assert "quantised       experts int4, attention int8" in lines
    # int4: 12 weights of 512², 0.523 bytes a number. int8: 768 × 1024 numbers of one byte, and 1536 scales.
    (files,) = (line for line in lines if line.startswith("files"))
    assert files == "files           1, 3.18 MB, int4 1.65 MB, int8 793 kB, bfloat16 721 kB, float32 14.3 kB"
    assert "complete        yes" in lines


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    tensors = random_adapter(ARGS, std=0.05)
    return save_adapter(tmp_path_factory.mktemp("adapter"), tensors, peft_args(ARGS, norm_tuning=False))


def test_adapters_chain_over_it(folders, source, adapter):
    options = {"device": "cpu", "dtype": torch.float32, "max_seq_len": 64}
    stored = MetaModel.from_pretrained([folders / "nf4", adapter], **options)
    loaded = MetaModel.from_pretrained([source, adapter], quant="nf4", **options)
    assert stored.llma.args.lora_rank == 4
    assert same_bytes(stored.llma, loaded.llma)
    plain = MetaModel.from_pretrained(folders / "nf4", **options)
    one, other, without = (m.compute_logits(["the cat sat"])[0] for m in (stored, loaded, plain))
    assert torch.equal(one, other)
    assert not torch.allclose(one, without)


def test_adapters_are_merged_into_what_it_means(folders, adapter, tmp_path, tensors):
    merge([folders / "nf4", adapter], tmp_path / "out", dtype="fp32", progress=False)
    merged = open_checkpoint(tmp_path / "out")
    assert (merged.layout, merged.quant) == ("sparse", None)
    lora = random_adapter(ARGS, std=0.05)
    a, b = (lora[EXPERT.replace("weight", f"lora_{x}.weight")] for x in "ab")
    want = rounded(tensors, QUANTS["nf4"])[EXPERT].float() + 1.5 * b @ a
    torch.testing.assert_close(merged.tensors[EXPERT].load(), want)


def test_lora_that_lies_beside_the_weights_stays(source, tmp_path, tensors):
    lora = random_adapter(ARGS, targets=("w1",))
    folder = make.write_accessory(
        tmp_path / "both", {**tensors, **lora}, "base", peft_args(ARGS, lora_targets=("w1",)), world=1
    )
    make.write_json(folder / "meta.json", {"llama_type": "mixtral_peft"})
    quantize_checkpoint(folder, tmp_path / "out", Quant("int8"), progress=False)
    opened = open_checkpoint(tmp_path / "out")
    assert str(opened.llama_type) == "mixtral_peft"
    assert all(torch.equal(opened.tensors[n].load(), t) for n, t in lora.items())
    assert same_bytes(load(tmp_path / "out", "sparse"), load(folder, "sparse", Quant("int8")))
