"""Errors for broken quantised folders, for sources that cannot become one, and for a disk that reads wrongly."""

import json
import shutil
import struct

import pytest
import torch
from helpers import checkpoints as make
from helpers.quantized import ARGS, EXPERT, half_tensors, write_quantized, write_source
from safetensors.torch import load_file, save_file

from accessory.convert.info import info
from accessory.convert.quantize import quantize_checkpoint
from accessory.convert.verify import verify
from accessory.errors import AccessoryError, CheckpointError, ConfigError
from accessory.formats import Quant
from accessory.model.meta import MetaModel


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"), half_tensors())


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory):
    return write_quantized(source, tmp_path_factory.mktemp("quantised"), ("int4", "nf4"))


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of the int4 folder (int8 attention) for a test to break."""
    return shutil.copytree(folders / "int4", tmp_path / "int4")


def edit(folder, change):
    stored = load_file(folder / "model.safetensors")
    stored = {n: t.clone() for n, t in stored.items()}
    change(stored)
    save_file(stored, folder / "model.safetensors")


def reconfigure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without_quantization(folder):
    (folder / "config.json").write_text(json.dumps(ARGS.to_dict(), default=dict))


def cut_columns(stored):
    stored[EXPERT + ".zero"] = stored[EXPERT + ".zero"][:, :2].clone()


def fewer_rows(stored):
    for piece in ("data", "scale", "zero"):
        stored[f"{EXPERT}.{piece}"] = stored[f"{EXPERT}.{piece}"][:256].clone()


DAMAGE = {
    "no scale": (lambda f: edit(f, lambda s: s.pop(EXPERT + ".scale")), rf"{EXPERT}\.scale: missing, though"),
    "no zero": (lambda f: edit(f, lambda s: s.pop(EXPERT + ".zero")), rf"{EXPERT}\.zero: missing, though"),
    "no data": (lambda f: edit(f, lambda s: s.pop(EXPERT + ".data")), rf"{EXPERT}\.data: missing, though its other"),
    "no weight": (
        lambda f: edit(f, lambda s: [s.pop(f"{EXPERT}.{p}") for p in ("data", "scale", "zero")]),
        rf"missing tensors: {EXPERT} \(1 of",
    ),
    "short zero": (lambda f: edit(f, cut_columns), rf"{EXPERT}\.zero: is \(512, 2\) uint8, but int4 wants \(512, 4\)"),
    "odd scale": (
        lambda f: edit(f, lambda s: s.update({EXPERT + ".scale": s[EXPERT + ".scale"].float()})),
        rf"{EXPERT}\.scale: is \(512, 4\) float32, but int4 wants \(512, 4\) bfloat16",
    ),
    "fewer rows": (
        lambda f: edit(f, fewer_rows),
        rf"{EXPERT}: shape \(256, 512\), but the configuration says \(512",
    ),
    "a dense expert": (
        lambda f: edit(f, lambda s: s.update({EXPERT: torch.zeros(512, 512)})),
        rf"{EXPERT}: is not quantised, but config\.json says int4",
    ),
    "another format": (lambda f: reconfigure(f, experts="nf4"), r"w1\.weight\.scale: is \(512, 4\) bfloat16, but nf4"),
    "not quantised": (lambda f: reconfigure(f, attention=None), r"wq\.weight: is quantised, but config\.json says"),
    "unknown format": (lambda f: reconfigure(f, experts="int3"), r"quantization\.experts: got 'int3'"),
    "unknown part": (lambda f: reconfigure(f, router="int8"), r"unknown key 'router'"),
    "later version": (lambda f: reconfigure(f, format_version=2), r"format_version: got 2, but only 1 is known"),
    "no quantization": (without_quantization, r'config\.json: has no "quantization"'),
    "no config": (lambda f: (f / "config.json").unlink(), r'config\.json: has no "quantization"'),
    "truncated": (cut_short, r"model\.safetensors: truncated: tensor \S+ ends at byte"),
    "half a header": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 10**6) + b"{}"),
        r"model\.safetensors: truncated: its header",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_broken_is_one_line(copied, damage):
    breaking, message = DAMAGE[damage]
    breaking(copied)
    with pytest.raises(AccessoryError, match=message) as error:
        MetaModel.from_pretrained(copied, device="cpu")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    report = verify(copied, progress=False)
    assert not report.ok
    assert not info(copied).complete


def test_verify_looks_at_every_number(copied, folders):
    def infinite(stored):
        stored[EXPERT + ".scale"][3, 1] = float("inf")

    edit(copied, infinite)
    report = verify(copied, progress=False)
    assert report.lines()[-2] == f"  problem: NaN or infinity in {EXPERT}.scale (1 of 22 tensors)"


def test_verify_sees_what_rounding_hides(folders, tmp_path):
    """A changed last bit of an fp32 scale does not show in bfloat16; verify still reports it."""
    copied = shutil.copytree(folders / "nf4", tmp_path / "nf4")
    assert verify(folders / "nf4", copied, progress=False).lines()[-1].startswith("equal: ")

    def turn(stored):
        stored[EXPERT + ".scale"].view(torch.int32)[3, 1] ^= 1

    edit(copied, turn)
    report = verify(folders / "nf4", copied, progress=False)
    assert report.a.hash == report.b.hash
    assert report.differences == [f"stored content differs: {EXPERT}.scale (1 of 32)"]
    assert not report.ok


def test_what_cannot_be_quantized_leaves_nothing(folders, source, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"int4: is quantised already \(experts int4, attention int8\)"):
        quantize_checkpoint(folders / "int4", tmp_path / "out", Quant("nf4"), progress=False)
    with pytest.raises(ConfigError, match="quant: nothing is to be quantised; give one of int8, fp8, int4, nf4"):
        quantize_checkpoint(source, tmp_path / "out", None, progress=False)
    odd = make.write_hf(tmp_path / "odd", make.random_tensors())
    with pytest.raises(
        ConfigError, match=r"layers\.0\.attention\.wq\.weight: its rows of 48 numbers are no whole groups of 128"
    ):
        quantize_checkpoint(odd, tmp_path / "out", Quant.parse("int4"), progress=False)
    with pytest.raises(CheckpointError, match="is the source itself"):
        quantize_checkpoint(source, source, Quant("int4"), progress=False)

    def full(handle, data, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("accessory.checkpoint.save._write_at", full)
    with pytest.raises(CheckpointError, match="cannot be written"):
        quantize_checkpoint(source, tmp_path / "out", Quant("int4"), progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd"]


def test_a_disk_that_lies_is_found_out(source, tmp_path, monkeypatch):
    import accessory.checkpoint.save as save

    written = save._write_at

    def forgetful(handle, data, offset):
        return written(handle, b"\0" * len(data), offset) if len(data) == 2048 else written(handle, data, offset)

    monkeypatch.setattr(save, "_write_at", lambda h, d, o: forgetful(h, memoryview(d), o))
    with pytest.raises(CheckpointError, match="reads back differently"):
        quantize_checkpoint(source, tmp_path / "out", Quant("int8"), progress=False)
    assert not any(tmp_path.iterdir())
