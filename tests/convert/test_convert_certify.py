"""The certificate of a merge: wrong merges that it catches, its bounds, and its logits against the decoder's."""

import functools

import pytest
import torch
from helpers.adapters import peft_args, random_adapter
from helpers.merging import (
    EVERYWHERE,
    IDS,
    close,
    logits,
    quiet_merge,
    refused,
)
from helpers.random_merges import random_merge
from helpers.random_models import canonical_from_hf, hf_mixtral

from accessory.checkpoint.chain import chained_args, open_chain
from accessory.checkpoint.lazy import Constant
from accessory.config import ModelArgs, MoEArgs
from accessory.convert import certify as certify_module
from accessory.convert import merge as merge_module
from accessory.convert.certify import Certificate, Difference, certify
from accessory.convert.merge import Change, merge_tensors
from accessory.convert.sums import check_sums
from accessory.errors import CheckpointError


def forget_scale(change):
    w, a, b = (lazy.load().float() for lazy in (change.before, change.pair.a, change.pair.b))
    return w + b @ a


def transpose_half(change):
    a = change.pair.a.load().float()
    return change.before.load().float() + change.pair.scale * change.pair.b.load().float() @ a.flip(0)


@pytest.mark.parametrize("wrong", [forget_scale, transpose_half])
@pytest.mark.parametrize("dtype", [None, pytest.param("fp32", marks=pytest.mark.slow)])
def test_a_wrong_merge_is_caught(tmp_path, base, adapter, monkeypatch, wrong, dtype):
    monkeypatch.setattr(Change, "merged", wrong)
    refused(tmp_path, "merged and unmerged logits differ: merged, in fp32", base, adapter, dtype=dtype)
    quiet_merge(base, adapter, tmp_path / "unproven", certificate=False)


def test_swapped_experts_are_caught(tmp_path, base, adapter, monkeypatch):
    right = merge_module.merge_tensors

    def swapped(tensors, args, dtype=None):
        out, changes = right(tensors, args, dtype)
        one, other = (f"layers.1.feed_forward.experts.{e}.w2.weight" for e in (0, 1))
        out[one], out[other] = out[other], out[one]
        return out, changes

    monkeypatch.setattr(merge_module, "merge_tensors", swapped)
    refused(tmp_path, "merged and unmerged logits differ", base, adapter)


def test_only_rounding_gone_wrong_is_caught_too(tmp_path, base, adapter, monkeypatch):
    right = merge_module.merge_tensors

    def coarse(tensors, args, dtype=None):
        out, changes = right(tensors, args, dtype)
        if dtype != torch.float32:
            out = {n: Constant(t.load().mul(8).round().div(8)) for n, t in out.items()}
        return out, changes

    monkeypatch.setattr(merge_module, "merge_tensors", coarse)
    refused(tmp_path, r"not W \+ scale·B·A rounded: .*; in the first, [0-9,]+ of .* numbers differ", base, adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layers", "std"), [pytest.param(2, 0.02, marks=pytest.mark.slow), (2, 0.2), (24, 0.2)])
def test_bounds_are_neither_tight_nor_idle(dtype, layers, std):
    """Holds for tame networks and for those that magnify every error a thousandfold (24 layers of large weights)."""
    args = ModelArgs(
        dim=64, hidden_dim=96, n_layers=layers, n_heads=4, n_kv_heads=2, vocab_size=256, moe=MoEArgs(num_experts=4)
    )
    weights = {n: t.to(dtype) for n, t in canonical_from_hf(hf_mixtral(args, std=std)).items()}
    tensors = {n: Constant(t) for n, t in (weights | random_adapter(args, targets=EVERYWHERE)).items()}
    networks = {
        "adapters": tensors,
        "exact": merge_tensors(tensors, peft_args(args), torch.float32)[0],
        "stored": merge_tensors(tensors, peft_args(args))[0],
    }
    before = {name: tensor.load().clone() for name, tensor in tensors.items()}
    found = certify(networks, peft_args(args), "sparse", dtype=dtype, progress=False)
    assert all(torch.equal(tensors[name].load(), before[name]) for name in before), "the sources are only read"
    found.check()
    assert found.exact_bound / 100 < found.exact.largest < found.exact_bound / 1.5
    check_sums(networks["stored"], tensors, peft_args(args).lora_scale, progress=False)
    assert found.stored.largest > 100 * found.exact.largest, "16 bits round more than fp32, by whatever factor"
    assert found.adapter is None


def check_random_adapters(seeds):
    largest = max((merge.prove() for merge in map(random_merge, seeds)), key=lambda c: c.exact.largest / c.exact_bound)
    assert largest.exact.largest > largest.exact_bound / 50, "the bound is not idle either"


def test_random_adapters_are_never_refused():
    check_random_adapters(range(10))


@pytest.mark.long
def test_a_thousand_random_adapters_are_never_refused():
    """They take a minute and a half on one core."""
    check_random_adapters(range(1000))


def leave_one_expert_out(merge, merged):
    name = next(n for n in merged if n.endswith("experts.1.w2.weight"))
    return merged | {name: Constant(merge.tensors[name].to(merge.dtype).load())}


def scale_by_half(merge, _):
    return merge_tensors(
        merge.tensors, merge.args.replace(lora_alpha=merge.args.lora_scale / 2 * merge.args.lora_rank)
    )[0]


def swap_two_experts(merge, merged):
    one, other = (f"layers.0.feed_forward.experts.{e}.w2.weight" for e in (0, 1))
    return merged | {one: merged[other], other: merged[one]}


def lose_a_norm(merge, merged):
    return merged | {"norm.weight": Constant(torch.ones(merged["norm.weight"].shape, dtype=merge.dtype))}


def double_round(merge, _):
    """Rounds B·A before the sum; only numbers can show it, no bound of logits."""
    zero = {n: Constant(torch.zeros(t.shape)) if ".lora_" not in n else t for n, t in merge.tensors.items()}
    updates = merge_tensors(zero, merge.args, merge.dtype)[0]
    return {
        n: Constant((merge.tensors[n].to(merge.dtype).load() + t.load()).to(merge.dtype)) for n, t in updates.items()
    }


@functools.cache
def proved(size, dtype):
    """A merge, after its proof. All faults change the same ones."""
    merge = random_merge(3, size=size, dtype=dtype)
    assert any(name.endswith("experts.1.w2.lora_b.weight") for name in merge.tensors)
    merge.prove()
    return merge


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1e-6, torch.float32),
        (1e-3, torch.float32),
        (3e-3, torch.bfloat16),
        (1e-3, torch.float16),
        (0.3, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("fault", [leave_one_expert_out, scale_by_half, swap_two_experts, lose_a_norm, double_round])
def test_a_fault_in_what_is_written_is_refused_whatever_the_updates_size(fault, size, dtype):
    if fault is double_round and dtype == torch.float32:
        pytest.skip("fp32 is what the sum is made in")
    merge = proved(size, dtype)
    with pytest.raises(CheckpointError, match=r"not W \+ scale·B·A rounded: .*; nothing was written"):
        merge.prove({name: tensor.to(dtype) for name, tensor in fault(merge, merge.merged()).items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_off_by_one_unit_is_seen(dtype):
    """In fp32 the order of the sum may cost some units, so there the number is off by a thousand of them."""
    merge = random_merge(3, size=0.1, dtype=dtype)
    merged, name = merge.merged(), "layers.0.feed_forward.experts.0.w2.weight"
    weight = merged[name].load().clone()
    units = torch.finfo(dtype).eps * (1000 if dtype == torch.float32 else 1)
    weight[1, 2] *= 1 + 1.5 * units
    with pytest.raises(CheckpointError, match=rf"{name}; in the first, 1 of "):
        check_sums(merged | {name: Constant(weight)}, merge.tensors, merge.args.lora_scale, progress=False)


def test_what_rounding_does_is_told_and_refuses_nothing(tmp_path, base, exact_base, adapter):
    for folder in (base, exact_base):  # in bf16 already, and in fp32
        found = quiet_merge(folder, adapter, tmp_path / f"of {folder.name}", dtype="bf16").certificate
        assert found.rounded.mean == pytest.approx(found.stored.mean, rel=0.5), "of one size"
        assert any("rounding the base to bf16 in the same way: at most" in line for line in found.lines())
    assert quiet_merge(exact_base, adapter, tmp_path / "fp32").certificate.rounded is None
    huge = Difference(10.0, 10.0, 1.0, 0, 0.0)
    same = Difference(0.0, 0.0, 0.0, 0, 0.0)
    Certificate(tokens=1, layers=1, dtype=torch.bfloat16, exact=same, stored=huge).check()


def test_both_implementations_certify_alike(exact_base, adapter):
    checkpoints = open_chain([exact_base, adapter])
    args = chained_args(checkpoints)
    tensors = merge_module._overlaid(checkpoints)
    networks = {
        "adapters": tensors,
        "exact": merge_tensors(tensors, args, torch.float32)[0],
        "stored": merge_tensors(tensors, args, torch.bfloat16)[0],
        "base": checkpoints[0].tensors,
    }
    a, b = (certify(networks, args, i, dtype=torch.bfloat16, progress=False) for i in ("base", "sparse"))
    assert a.stored.mean == pytest.approx(b.stored.mean, rel=1e-3)
    assert a.adapter.mean == pytest.approx(b.adapter.mean, rel=1e-4)
    assert a.adapter.mean > 10 * a.stored.mean > 0
    assert a.stored.kl > 0


def test_the_certificates_network_is_the_decoder(exact_base, adapter):
    """The certificate's layer-by-layer run gives the same logits as the whole decoder."""
    checkpoints = open_chain([exact_base, adapter])
    args = chained_args(checkpoints)
    run = certify_module._Run({"adapters": merge_module._overlaid(checkpoints)}, args, "base", IDS, torch.device("cpu"))
    got = run.logits(progress=False)["adapters"]
    assert close(got, logits([exact_base, adapter]).flatten(0, 1), 1e-6)
    layer = run._filled(run.networks["adapters"], 1, "layers.0")
    there = {n for n, p in layer.named_parameters() if p.device.type != "meta"}
    assert there
    assert all(name.startswith("layers.0.") for name in there), "one layer's weights and no more are in memory"


def test_a_difference_by_hand():
    same = Difference.between(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
    assert (same.largest, same.mean, same.kl) == (0, 0, 0)
    d = Difference.between(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[3.0, 4.5], [0.0, 1.0]]))
    assert (d.largest, d.mean) == pytest.approx((0.1, 0.05))
    p, q = (torch.tensor(x).softmax(-1) for x in ([3.0, 4.0], [3.0, 4.5]))
    assert d.kl == pytest.approx(float((p * (p / q).log()).sum()) / 2, rel=1e-5)
    nan = Difference.between(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(CheckpointError, match="logits differ"):
        Certificate(tokens=1, layers=1, dtype=torch.float32, exact=nan, stored=same).check()
