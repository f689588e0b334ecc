"""What an adapter says of the model that it was trained on: one hash in every form, a warning on another model."""

import hashlib
import json
import logging

import pytest
import torch
from helpers import checkpoints as make
from helpers.adapters import peft_args, random_adapter, save_adapter
from helpers.checkpoints import random_tensors

from accessory.checkpoint.chain import open_chain, trained_on
from accessory.checkpoint.folder import open_checkpoint
from accessory.checkpoint.lazy import Constant
from accessory.checkpoint.save import write_checkpoint
from accessory.convert.quantize import quantize_checkpoint
from accessory.errors import CheckpointError, ConfigError
from accessory.formats import Quant

HALF = random_tensors()
FP32 = {n: t.float() * (1 + 2**-12) for n, t in HALF.items()}  # rounded to bf16, it is HALF


def by_hand(tensors):
    """The hash as docs/checkpoints.md tells it."""
    lines = []
    for name, tensor in sorted(tensors.items()):
        if "norm" in name or "gate" in name:
            value = tensor.bfloat16().contiguous()
            sha = hashlib.sha256(value.view(torch.uint8).numpy().tobytes()).hexdigest()
            lines.append(f"{name} {','.join(map(str, value.shape))} bfloat16 {sha}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


WRITERS = {
    "base": lambda folder: make.write_accessory(folder, HALF, "base", world=4),
    "sparse": lambda folder: make.write_accessory(folder, HALF, "sparse", world=2),
    "fp32": lambda folder: make.write_accessory(folder, FP32, "base", world=1),
    "hf": lambda folder: make.write_hf(folder, HALF),
    "torrent": lambda folder: make.write_torrent(folder, HALF),
    "official": lambda folder: make.write_official(folder, HALF),
}


@pytest.mark.parametrize("form", WRITERS)
def test_a_model_has_one_hash_in_every_form(tmp_path, form):
    opened = open_checkpoint(WRITERS[form](tmp_path / form))
    found = trained_on([opened], ())
    assert found.hash == by_hand(HALF)
    assert found.name == str(tmp_path / form)
    if form == "sparse":
        quantize_checkpoint(tmp_path / form, tmp_path / "int8", Quant.parse("int8", "int8", "int8"), progress=False)
        assert trained_on([open_checkpoint(tmp_path / "int8")], ()).hash == found.hash


def test_one_norm_makes_another_model(tmp_path):
    other = HALF | {"layers.1.ffn_norm.weight": HALF["layers.1.ffn_norm.weight"] * 2}
    assert trained_on([open_checkpoint(make.write_accessory(tmp_path, other, "base"))], ()).hash == by_hand(other)
    assert by_hand(other) != by_hand(HALF)


def write_adapter(folder, below, tensors=None):
    """Writes LoRA, or `tensors`, as it is written when it was trained over `below`."""
    lazies = {name: Constant(tensor) for name, tensor in (tensors or random_adapter()).items()}
    said = trained_on(below, lazies) if below else None
    write_checkpoint(
        folder, lazies, peft_args(), to="base", shards=1, allow_partial=True, progress=False, trained_on=said
    )
    return folder


def test_an_adapter_on_another_model_is_told_once(tmp_path, caplog, monkeypatch):
    base, same = make.write_accessory(tmp_path / "a", HALF, "base"), make.write_hf(tmp_path / "a hf", HALF)
    other = make.write_accessory(tmp_path / "b", random_tensors(seed=1), "base")
    adapter = write_adapter(tmp_path / "adapter", open_chain([base]))
    meta = json.loads((adapter / "meta.json").read_text())
    assert meta == {"llama_type": "mixtral_peft", "trained_on": {"name": str(base), "hash": by_hand(HALF)}}
    old = save_adapter(tmp_path / "old", random_adapter(), peft_args())
    with caplog.at_level(logging.WARNING):
        for chain in ([base, adapter], [same, adapter], [base, old], [other, old]):
            open_chain(chain)
        assert not caplog.records
        open_chain([other, adapter])
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{adapter}: was trained on {base} (norms and routers of hash ")
    assert f"but {other} is another model" in record.getMessage()
    assert "\n" not in record.getMessage()
    with pytest.raises(CheckpointError, match=r"another model .*; give the model .* or --allow-other-base"):
        open_chain([other, adapter], refuse_other_base=True)
    caplog.clear()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    open_chain([other, adapter])
    assert not caplog.records, "the first rank says it"


def test_in_a_chain_the_base_is_all_that_lay_below(tmp_path, caplog):
    base = make.write_accessory(tmp_path / "base", HALF, "base")
    norms = random_adapter() | {"norm.weight": HALF["norm.weight"].float() + 1}
    first = write_adapter(tmp_path / "first", open_chain([base]), norms)
    second = write_adapter(tmp_path / "second", open_chain([base, first]))
    open_chain([base, first, second])
    assert not caplog.records
    third = write_adapter(tmp_path / "third", open_chain([base, first]), norms)
    for chain in ([base, first, third], [base, third]):  # the third replaces all of the first
        open_chain(chain)
        assert not caplog.records
    open_chain([base, second])
    assert f"was trained on {base} + {first} " in caplog.text


@pytest.mark.parametrize("said", ["base", {"name": "base"}, {"name": 3, "hash": "x"}, []])
def test_what_it_says_must_be_of_its_form(tmp_path, said):
    adapter = save_adapter(tmp_path / "a", random_adapter(), peft_args())
    (adapter / "meta.json").write_text(json.dumps({"llama_type": "mixtral_peft", "trained_on": said}))
    with pytest.raises(ConfigError, match=r"meta\.json: trained_on: got .*, but it must be an object"):
        open_checkpoint(adapter, allow_partial=True)
