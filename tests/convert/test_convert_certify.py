"""The certificate of a merge: wrong merges that it catches, its bounds, and its logits against the decoder's."""

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
from helpers.random_models import canonical_from_hf, hf_mixtral

from accessory.checkpoint.chain import chained_args, open_chain
from accessory.checkpoint.lazy import Constant
from accessory.config import ModelArgs, MoEArgs
from accessory.convert import certify as certify_module
from accessory.convert import merge as merge_module
from accessory.convert.certify import Certificate, Difference, certify
from accessory.convert.merge import Change, merge_tensors
from accessory.errors import CheckpointError


def forget_scale(change):
    w, a, b = (lazy.load().float() for lazy in (change.before, change.pair.a, change.pair.b))
    return w + b @ a


def transpose_half(change):
    a = change.pair.a.load().float()
    return change.before.load().float() + change.pair.scale * change.pair.b.load().float() @ a.flip(0)


@pytest.mark.parametrize("wrong", [forget_scale, transpose_half])
@pytest.mark.parametrize("dtype", [None, "fp32"])
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
    refused(tmp_path, "logits differ: merged and rounded to bf16", base, adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layers", "std"), [(2, 0.02), (2, 0.2), (24, 0.2)])
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
    assert found.stored_bound / 10 < found.stored.largest < found.stored_bound / 1.5
    assert found.adapter is None


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
