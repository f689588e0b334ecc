"""LoRA and biases: against the definition, and the same in both implementations."""

import pytest
import torch
from helpers.random_models import canonical_from_hf, decoder_from_canonical, hf_mixtral
from helpers.sizes import TINY

from accessory.adapt.peft import (
    AdapterSpec,
    adapter_specs_for,
    adapter_specs_of,
    add_adapters,
    initial_tensor,
    trainable_rule,
)
from accessory.config import LORA_TARGETS
from accessory.errors import ConfigError

ARGS = TINY.replace(
    lora_rank=8,
    lora_alpha=16.0,
    lora_targets=(*LORA_TARGETS, "gate", "output"),
    bias_tuning=True,
)
TOKENS_BT = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def adapted(implementation, tensors, dtype=torch.float32, adapters=True):
    decoder = decoder_from_canonical(ARGS, implementation, tensors, dtype)
    if adapters:
        add_adapters(decoder, adapter_specs_for(ARGS), ARGS.lora_scale)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, p in decoder.named_parameters():
                if "lora" in name or "bias" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return decoder


def by_hand(decoder, tensors):
    """The canonical weights with LoRA merged in, one linear at a time."""
    out = dict(tensors)
    state = dict(decoder.named_parameters())
    for name in tensors:
        linear = name.removesuffix(".weight")
        if ".experts." in linear:
            stack, e, kind = linear.rsplit(".", 2)
            a, b = (state.get(f"{stack}.{kind}_lora_{x}") for x in "ab")
            a, b = (None if t is None else t[int(e)] for t in (a, b))
        else:
            a, b = (state.get(f"{linear}.lora_{x}.weight") for x in "ab")
        if a is not None:
            out[name] = (tensors[name] + 2.0 * b @ a).detach()
    return out


@pytest.fixture(scope="module")
def tensors():
    return canonical_from_hf(hf_mixtral(ARGS))


@pytest.mark.parametrize("implementation", ["base", "sparse"])
def test_lora_beside_is_lora_multiplied_in(tensors, implementation):
    decoder = adapted(implementation, tensors)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if "bias" in name:
                p.zero_()
    merged = decoder_from_canonical(ARGS, implementation, by_hand(decoder, tensors))
    expected = merged(TOKENS_BT).logits
    assert (expected - decoder_from_canonical(ARGS, implementation, tensors)(TOKENS_BT).logits).abs().max() > 1e-2
    torch.testing.assert_close(decoder(TOKENS_BT).logits, expected, rtol=1e-5, atol=1e-5)


def test_both_implementations_agree_with_biases_and_their_gradients_too(tensors):
    grads = []
    for implementation in ("base", "sparse"):
        decoder = adapted(implementation, tensors)
        decoder(TOKENS_BT).logits.float().square().sum().backward()
        grads.append({n: p.grad for n, p in decoder.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("implementation", ["base", "sparse"])
@pytest.mark.parametrize("kind", ["wo", "w1", "w2"])
def test_a_bias_is_added_to_its_product(tensors, implementation, kind):
    """All weights are zero and only the bias remains, so the layer's output is known by hand."""
    decoder = decoder_from_canonical(ARGS, implementation, tensors)
    add_adapters(
        decoder, {n: b for n, b in adapter_specs_for(ARGS.replace(lora_rank=-1)).items() if n.startswith("layers.0.")}
    )
    layer = decoder.layers[0]
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        bias = layer.attention.wo.bias if kind == "wo" else getattr(layer.feed_forward.experts, f"{kind}_bias")
        bias.fill_(1.5)
        if kind == "w1":  # silu(1.5) · w3's bias 2, then w2's one non-zero row
            layer.feed_forward.experts.w3_bias.fill_(2.0)
            layer.feed_forward.experts.w2[:, 0, 0] = 1.0
    x_BTD = torch.zeros(1, 3, ARGS.dim)
    rotation = torch.ones(1, 3, 1, ARGS.head_dim // 2, dtype=torch.complex64)
    y_BTD, _, _ = layer(x_BTD, None, rotation, None, None, None, False)
    if kind == "w1":
        expected = torch.zeros_like(x_BTD)
        expected[..., 0] = 2.0 * torch.nn.functional.silu(torch.tensor(1.5))
    else:
        expected = torch.full_like(x_BTD, 1.5)  # the routing weights of a token sum to one
    torch.testing.assert_close(y_BTD, expected)


def test_besides_follow_configuration_and_tensors():
    wanted = adapter_specs_for(ARGS.replace(lora_targets=("wq", "w2"), n_layers=1))
    assert wanted["layers.0.attention.wq"] == AdapterSpec(8, bias=True)
    assert wanted["layers.0.attention.wo"] == AdapterSpec(0, bias=True)
    assert wanted["layers.0.feed_forward.experts.3.w2"] == AdapterSpec(8, bias=True)
    assert "output" not in wanted
    assert "layers.0.feed_forward.gate" not in wanted
    shapes = {
        "layers.0.attention.wq.lora_a.weight": (8, 32),
        "layers.0.attention.wq.lora_b.weight": (32, 8),
        "layers.0.attention.wq.bias": (32,),
        "layers.0.attention.wo.weight": (32, 32),
    }
    assert adapter_specs_of(shapes) == {"layers.0.attention.wq": AdapterSpec(8, bias=True)}


def test_a_linear_that_is_not_there_is_named(tensors):
    decoder = decoder_from_canonical(ARGS, "base", tensors)
    for name in ("layers.0.attention.wx", "layers.9.feed_forward.experts.0.w1", "norm"):
        with pytest.raises(ConfigError, match=name.split(".experts")[0].replace(".", r"\.")):
            add_adapters(decoder, {name: AdapterSpec(4)})


def test_initial_values_change_nothing_and_depend_on_name_and_seed_alone():
    name = "layers.0.attention.wq.lora_a.weight"
    a = initial_tensor(name, (8, 64), seed=3)
    assert torch.equal(a, initial_tensor(name, (8, 64), seed=3))
    assert not torch.equal(a, initial_tensor(name, (8, 64), seed=4))
    assert not torch.equal(a, initial_tensor(name.replace("wq", "wk"), (8, 64), seed=3))
    assert 0.1 < a.abs().max() <= 1 / 8
    assert not initial_tensor(name.replace("lora_a", "lora_b"), (64, 8), seed=3).any()


def test_what_is_trained(tensors):
    decoder = adapted("sparse", tensors)
    names = [n for n, _ in decoder.named_parameters()]

    def trained(peft=True, train_router=False, **changes):
        rule = trainable_rule(ARGS.replace(**changes), peft, train_router)
        return {n for n in names if rule(n)}

    assert trained(peft=False) == set(names)
    lora = trained(bias_tuning=False, norm_tuning=False)
    assert lora == {n for n in names if "lora" in n}
    assert "layers.0.feed_forward.experts.w1_lora_a" in lora
    norms = trained(lora_rank=-1, bias_tuning=False)
    assert norms == {n for n in names if n.endswith("norm.weight")}
    assert "norm.weight" in norms
    biases = trained(lora_rank=-1, norm_tuning=False)
    assert biases == {n for n in names if n.endswith("bias")}
    assert "layers.0.feed_forward.experts.w2_bias" in biases
    assert trained(lora_rank=-1, bias_tuning=False, norm_tuning=False, train_router=True) == {
        f"layers.{i}.feed_forward.gate.{w}" for i in (0, 1) for w in ("weight", "lora_a.weight", "lora_b.weight")
    }


@pytest.mark.parametrize(
    ("field", "value"), [("lora_rank", 0), ("lora_alpha", -1.0), ("lora_targets", ["wx"]), ("lora_targets", [])]
)
def test_configuration_is_checked(field, value):
    with pytest.raises(ConfigError, match=field):
        ARGS.replace(**{field: value})
