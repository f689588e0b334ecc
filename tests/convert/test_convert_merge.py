"""Merging: hand-made numbers, the result of transformers, and all inputs that must be refused."""

import json
import re

import pytest
import torch
from helpers import checkpoints as make
from helpers.adapters import linears, peft_args, random_adapter, save_adapter
from helpers.checkpoints import ARGS
from helpers.merging import (
    EVERYWHERE,
    HALF,
    IDS,
    TENSORS,
    close,
    logits,
    quiet_merge,
    refused,
    values,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.checkpoint.folder import open_checkpoint
from accessory.checkpoint.lazy import Constant
from accessory.checkpoint.save import write_checkpoint
from accessory.checkpoint.trained_on import TrainedOn
from accessory.convert.merge import merge_tensors
from accessory.errors import CheckpointError

# --------------------------------------------------------------------------- numbers


def test_numbers_made_by_hand():
    weight = "layers.0.attention.wo"
    tensors = {
        f"{weight}.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        f"{weight}.lora_a.weight": torch.tensor([[1.0, -1.0]]),
        f"{weight}.lora_b.weight": torch.tensor([[2.0], [1.0]]),
        f"{weight}.bias": torch.tensor([5.0, 6.0]),
        "layers.0.attention_norm.weight": torch.tensor([1.0, 1.0]),
    }
    lazies = {name: Constant(tensor) for name, tensor in tensors.items()}
    merged, changes = merge_tensors(lazies, peft_args(rank=1, alpha=3.0))
    assert list(merged) == [f"{weight}.weight", f"{weight}.bias", "layers.0.attention_norm.weight"]
    assert merged[f"{weight}.weight"].load().tolist() == [[7.0, -4.0], [6.0, 1.0]]
    assert merged[f"{weight}.bias"].load().tolist() == [5.0, 6.0]
    assert tensors[f"{weight}.weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]], "the source is left alone"
    effect = changes[0].effect()
    assert (effect.name, effect.state) == (f"{weight}.weight", "changed")
    assert effect.size == pytest.approx((90 / 30) ** 0.5)  # the norm of 3·(2, -2, 1, -1) by that of (1, 2, 3, 4)
    plain, _ = merge_tensors(lazies, peft_args(rank=1, alpha=None))
    assert plain[f"{weight}.weight"].load().tolist() == [[3.0, 0.0], [4.0, 3.0]]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_whole_numbers_come_out_exactly(data):
    rows, columns, rank = (data.draw(st.integers(1, 5)) for _ in range(3))
    seed, scale = data.draw(st.integers(0, 2**20)), data.draw(st.sampled_from([0.5, 1.0, 2.0]))
    generator = torch.Generator().manual_seed(seed)
    w, a, b = (
        torch.randint(-9, 10, shape, generator=generator).float()
        for shape in ((rows, columns), (rank, columns), (rows, rank))
    )
    names = ("output.weight", "output.lora_a.weight", "output.lora_b.weight")
    lazies = {n: Constant(t) for n, t in zip(names, (w, a, b), strict=True)}
    merged, changes = merge_tensors(lazies, peft_args(rank=rank, alpha=scale * rank))
    assert torch.equal(merged["output.weight"].load().double(), w.double() + scale * (b.double() @ a.double()))
    assert (changes[0].effect().state == "zero") == (not (b.double() @ a.double()).any())


def test_the_sum_is_rounded_once():
    """Compares with float64; a second rounding, of B·A before the sum, would show."""
    weight, generator = "output.weight", torch.Generator().manual_seed(0)
    w = torch.randn(64, 32, generator=generator).bfloat16()
    a, b = torch.randn(4, 32, generator=generator) * 0.5, torch.randn(64, 4, generator=generator) * 0.5
    lazies = {weight: Constant(w), "output.lora_a.weight": Constant(a), "output.lora_b.weight": Constant(b)}
    merged = merge_tensors(lazies, peft_args(alpha=None))[0][weight].load()
    once = (w.double() + b.double() @ a.double()).bfloat16()
    twice = w + (b @ a).bfloat16()
    assert (merged != once).double().mean() < 0.001, "fp32 may fall on the other side of a tie"
    assert (twice != once).double().mean() > 0.01


# --------------------------------------------------------------------------- networks


@pytest.mark.parametrize("implementation", [pytest.param("base", marks=pytest.mark.slow), "sparse"])
def test_the_merged_network_is_the_network_with_its_adapter(tmp_path, exact_base, implementation):
    adapter = save_adapter(
        tmp_path / "a",
        random_adapter(targets=EVERYWHERE),
        peft_args(lora_targets=EVERYWHERE),
        to=implementation,
        shards=2,
    )
    report = quiet_merge(exact_base, adapter, tmp_path / "out", to=implementation)
    wanted = logits([exact_base, adapter], implementation)
    assert close(logits([tmp_path / "out"], implementation), wanted)
    assert not close(logits([exact_base], implementation), wanted, 0.1)
    assert report.certificate.exact.largest < 3e-6
    assert report.certificate.stored.largest < 3e-6  # fp32 is not rounded
    out = open_checkpoint(tmp_path / "out")
    assert out.layout == implementation
    assert str(out.llama_type) == {"base": "mixtral", "sparse": "mixtral_sparse"}[implementation]
    assert out.args == ARGS


def test_transformers_with_weights_changed_by_hand(tmp_path, exact_base):
    tensors = random_adapter(targets=EVERYWHERE, seed=3)
    adapter = save_adapter(tmp_path / "a", tensors, peft_args(alpha=2.0, lora_targets=EVERYWHERE))
    quiet_merge(exact_base, adapter, tmp_path / "out", to="hf")
    by_hand = dict(TENSORS)
    for name in linears(ARGS, EVERYWHERE):
        a, b = tensors[f"{name}.lora_a.weight"], tensors[f"{name}.lora_b.weight"]
        by_hand[f"{name}.weight"] = TENSORS[f"{name}.weight"] + 0.5 * b @ a
    make.write_hf(tmp_path / "by hand", by_hand)
    from transformers import MixtralForCausalLM

    got, wanted = (
        MixtralForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()(IDS).logits.detach()
        for name in ("out", "by hand")
    )
    assert close(got, wanted, 1e-6)


@pytest.mark.parametrize(("to", "shards"), [("base", 4), ("sparse", 4), ("hf", None), ("torrent", None)])
def test_every_layout_gets_the_same_weights(tmp_path, base, adapter, to, shards):
    quiet_merge(base, adapter, tmp_path / "out", to=to, shards=shards, certificate=False)
    quiet_merge(base, adapter, tmp_path / "ref", certificate=False)
    got, wanted = values(tmp_path / "out"), values(tmp_path / "ref")
    assert got.keys() == wanted.keys() == TENSORS.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert open_checkpoint(tmp_path / "ref").shards == 2, "as many as the base had"
    assert open_checkpoint(tmp_path / "out").args == ARGS or to in ("hf", "torrent")


def test_a_dtype_of_its_own_is_reached_in_one_step(tmp_path, base, adapter):
    quiet_merge(base, adapter, tmp_path / "out", dtype="fp32")
    merged, lora = values(tmp_path / "out"), values(adapter)
    name = "layers.1.feed_forward.experts.3.w2"
    update = 1.5 * lora[f"{name}.lora_b.weight"] @ lora[f"{name}.lora_a.weight"]
    assert torch.allclose(merged[f"{name}.weight"], HALF[f"{name}.weight"].float() + update, atol=1e-6)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}


def test_adapters_in_a_chain(tmp_path, exact_base):
    attention = save_adapter(tmp_path / "1", random_adapter(targets=("wq", "wo")), peft_args())
    experts = save_adapter(tmp_path / "2", random_adapter(targets=("w1",), seed=1), peft_args(), to="sparse", shards=4)
    quiet_merge(exact_base, attention, experts, tmp_path / "out")
    assert close(logits([tmp_path / "out"]), logits([exact_base, attention, experts]))
    other = save_adapter(tmp_path / "3", random_adapter(targets=("w2",), seed=1), peft_args(alpha=8.0))
    with pytest.raises(CheckpointError, match=r"scales LoRA by 1\.5, .*/3 by 2; merge the first"):
        quiet_merge(exact_base, attention, other, tmp_path / "no")
    whole = tmp_path / "whole"
    make.write_accessory(whole, {**TENSORS, **random_adapter()}, "base", peft_args(), world=1)
    quiet_merge(whole, tmp_path / "one folder")
    assert close(logits([tmp_path / "one folder"]), logits([whole]))


def test_a_save_without_a_configuration_is_of_the_bases(tmp_path, exact_base):
    lora = random_adapter()
    adapter = save_adapter(tmp_path / "a", lora, peft_args(alpha=None))
    for name in ("config.json", "meta.json"):
        (adapter / name).unlink()
    quiet_merge(exact_base, adapter, tmp_path / "out")
    merged, name = values(tmp_path / "out"), "layers.0.attention.wk"
    update = lora[f"{name}.lora_b.weight"] @ lora[f"{name}.lora_a.weight"]
    assert torch.allclose(merged[f"{name}.weight"], TENSORS[f"{name}.weight"] + update, atol=1e-6)


def test_whole_tensors_replace_the_bases(tmp_path, base):
    norm, head = "layers.1.ffn_norm.weight", "output.weight"
    trained = random_adapter(targets=("wq",)) | {norm: TENSORS[norm] + 0.001, head: TENSORS[head] * 1.5}
    report = quiet_merge(base, save_adapter(tmp_path / "a", trained, peft_args()), tmp_path / "out")
    out = values(tmp_path / "out")
    assert torch.equal(out[norm], trained[norm])  # fp32, because rounding would erase the training
    assert torch.equal(out[head], trained[head].bfloat16())
    assert report.replaced == [norm, head]
    assert any("trained whole" in line for line in report.lines())


@pytest.mark.parametrize("to", ["base", pytest.param("sparse", marks=pytest.mark.slow)])
def test_biases_stay_beside_the_weights(tmp_path, exact_base, to):
    args = peft_args(bias_tuning=True)
    adapter = save_adapter(tmp_path / "a", random_adapter(bias=True), args)
    report = quiet_merge(exact_base, adapter, tmp_path / "out", to=to, shards=2)
    assert close(logits([tmp_path / "out"], to), logits([exact_base, adapter], to))
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["bias_tuning"] is True
    assert config.get("lora_rank", -1) == -1
    assert json.loads((out / "meta.json").read_text()) == {
        "llama_type": {"base": "mixtral_peft", "sparse": "mixtral_sparse_peft"}[to]
    }
    assert any("biases have no place in a plain weight" in line for line in report.lines())
    for layout, whose in (("hf", "Hugging Face's Mixtral"), ("torrent", "the torrent layout")):
        with pytest.raises(CheckpointError, match=rf"attention\.wq\.bias: {whose} has no biases"):
            quiet_merge(exact_base, adapter, tmp_path / "no", to=layout)
    assert not (tmp_path / "no").exists()


# --------------------------------------------------------------------------- what is said and refused


def test_experts_that_did_not_change_are_listed(tmp_path, base):
    tensors = random_adapter()
    for name in tensors:
        if re.match(r"layers\.1\.feed_forward\.experts\.[35]\..*lora_b", name):
            tensors[name].zero_()
        if name.startswith("layers.0.feed_forward.experts.2.w1.lora_a"):
            tensors[name].zero_()
    report = quiet_merge(base, save_adapter(tmp_path / "a", tensors, peft_args()), tmp_path / "out")
    assert report.idle_experts() == {"layers.1": [3, 5]}
    first, second, *_ = report.lines()
    assert first.startswith("layers.0: 27 of 28 weights changed")
    assert "unchanged experts" not in first
    assert second.startswith("layers.1: 22 of 28 weights changed")
    assert second.endswith("; unchanged experts: 3, 5")
    assert {e.state for e in report.unchanged} == {"zero"}


def test_an_adapter_that_changes_nothing(tmp_path, base):
    untrained = {n: torch.zeros_like(t) if "lora_b" in n else t for n, t in random_adapter().items()}
    adapter = save_adapter(tmp_path / "a", untrained, peft_args())
    refused(tmp_path, "changes nothing: B·A is exactly zero beside all 56 weights", base, adapter)
    report = quiet_merge(base, adapter, tmp_path / "anyway", allow_unchanged=True)
    assert report.idle_experts() == {"layers.0": list(range(8)), "layers.1": list(range(8))}
    same = save_adapter(tmp_path / "b", {"norm.weight": HALF["norm.weight"]}, ARGS)
    refused(tmp_path, "changes nothing: all is as in the base", base, same)
    refused(tmp_path, "no adapter: nothing stands beside a weight", base)


def test_updates_that_rounding_takes_away(tmp_path, base, exact_base):
    tensors = random_adapter()
    for side in ("lora_a", "lora_b"):
        tensors[f"layers.0.feed_forward.experts.6.w3.{side}.weight"] *= 1e-3
    adapter = save_adapter(tmp_path / "a", tensors, peft_args())
    refused(
        tmp_path, r"takes away the whole update of 1 weights: layers\.0\.feed_forward\.experts\.6\.w3", base, adapter
    )
    report = quiet_merge(base, adapter, tmp_path / "accepted", allow_unchanged=True)
    assert [e.state for e in report.unchanged] == ["swallowed"]
    assert not quiet_merge(exact_base, adapter, tmp_path / "wide").unchanged
    assert not quiet_merge(base, adapter, tmp_path / "wider", dtype="fp32").unchanged


def test_incomplete_and_foreign_adapters(tmp_path, base):
    tensors, name = random_adapter(), "layers.0.attention.wv"
    half = {n: t for n, t in tensors.items() if n != f"{name}.lora_b.weight"}
    refused(
        tmp_path,
        r"layers\.0\.attention\.wv\.lora_b\.weight: missing, though",
        base,
        save_adapter(tmp_path / "half", half, peft_args()),
    )
    odd = tensors | {f"{name}.lora_b.weight": torch.randn(16, 3)}
    refused(tmp_path, "are of different rank", base, save_adapter(tmp_path / "odd", odd, peft_args()))
    rank = save_adapter(tmp_path / "rank", tensors, peft_args(rank=8))
    refused(tmp_path, "is not of lora_rank 8, by which lora_alpha is divided", base, rank)
    wide = ARGS.replace(vocab_size=160)
    other = save_adapter(tmp_path / "other", random_adapter(wide), peft_args(wide))
    refused(tmp_path, "vocab_size: got 160, but .*base has 80: another model's", base, other)
    refused(
        tmp_path,
        r"adapter: is an adapter \(LoRA of rank 4",
        save_adapter(tmp_path / "adapter", tensors, peft_args()),
        base,
    )
    broken = tensors | {f"{name}.lora_a.weight": tensors[f"{name}.lora_a.weight"] * float("nan")}
    refused(tmp_path, "infinite numbers or NaN", base, save_adapter(tmp_path / "nan", broken, peft_args()))
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    refused(tmp_path, "is a PEFT adapter; bring it in with `accessory adapter import`", base, tmp_path / "peft")


def test_an_adapter_is_not_merged_into_another_model(tmp_path, base, caplog):
    lazies = {name: Constant(tensor) for name, tensor in random_adapter().items()}
    said = TrainedOn("some/model", "0" * 64)
    adapter = tmp_path / "adapter"
    write_checkpoint(
        adapter, lazies, peft_args(), to="base", shards=1, allow_partial=True, progress=False, trained_on=said
    )
    refused(tmp_path, r"was trained on some/model .*/base is another model.* or --allow-other-base", base, adapter)
    quiet_merge(base, adapter, tmp_path / "all the same", allow_other_base=True)
    assert "trained on some/model" in caplog.text


def test_sources_are_never_written_over(tmp_path, base, adapter):
    for dst in (base, adapter, tmp_path):
        with pytest.raises(CheckpointError, match=r"is the source itself|holds the source"):
            quiet_merge(base, adapter, dst, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


# --------------------------------------------------------------------------- saves of what was trained


@pytest.mark.parametrize("what", ["lora", "bias", "experts only", "with norms and router"])
@pytest.mark.parametrize(
    ("to", "shards"),
    [
        pytest.param("base", 1, marks=pytest.mark.slow),
        ("base", 4),
        pytest.param("sparse", 1, marks=pytest.mark.slow),
        ("sparse", 8),
    ],
)
def test_what_is_saved_is_what_is_read(tmp_path, what, to, shards):
    tensors = random_adapter(targets=("w1", "w2") if what == "experts only" else EVERYWHERE, bias=what == "bias")
    if what == "bias":
        tensors = {n: t for n, t in tensors.items() if n.endswith(".bias")}
    if what == "with norms and router":
        tensors |= {n: TENSORS[n] for n in TENSORS if n.endswith(("norm.weight", "gate.weight"))}
    saved = open_checkpoint(
        save_adapter(tmp_path / "a", tensors, peft_args(bias_tuning=what == "bias"), to=to, shards=shards),
        allow_partial=True,
    )
    assert saved.partial
    assert saved.llama_type.implementation == to
    assert saved.llama_type.peft
    assert saved.shards == shards
    assert saved.args == peft_args(bias_tuning=what == "bias")
    assert saved.tensors.keys() == tensors.keys()
    assert all(torch.equal(saved.tensors[name].load(), tensors[name]) for name in tensors)
