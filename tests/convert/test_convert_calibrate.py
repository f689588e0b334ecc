"""Calibration: the inputs it collects, the experts it reaches, and that it lowers the error on unseen text."""

import pytest
import torch
from helpers.random_models import canonical_from_hf, decoder_from_canonical, hf_mixtral
from helpers.sizes import TINY

from accessory.checkpoint.lazy import Constant
from accessory.convert.calibrate import FEW_TOKENS, Calibration, Reached
from accessory.errors import CheckpointError, ConfigError
from accessory.formats import Quant
from accessory.ops.gptq import gptq
from accessory.ops.quantized import dequantize, quantize
from accessory.ops.quantized_search import search_int4

ARGS = TINY.replace(dim=128, hidden_dim=256, head_dim=32, vocab_size=96)
INT4 = Quant("int4", "int4", "int4")


@pytest.fixture(scope="module")
def tensors():
    return {n: t.clone() for n, t in canonical_from_hf(hf_mixtral(ARGS, std=0.1)).items()}


def tokens(seed=0, rows=32, length=32):
    """Random tokens, some far more frequent than others, as in real text."""
    share = 1.0 / torch.arange(1, ARGS.vocab_size + 1)
    return torch.multinomial(share.repeat(rows, 1), length, True, generator=torch.Generator().manual_seed(seed))


def lazy(tensors):
    return {n: Constant(t) for n, t in tensors.items()}


def calibrate(tensors, quant=INT4, tokens_BT=None, **options):
    calibration = Calibration(lazy(tensors), ARGS, quant, tokens() if tokens_BT is None else tokens_BT, **options)
    return dict(calibration.weights(progress=False)), calibration.reached


def logits(tensors, tokens_BT):
    with torch.no_grad():
        return decoder_from_canonical(ARGS, "sparse", tensors)(tokens_BT).logits


def outcome(tensors, packed):
    """The tensors, with dequantised values for the calibrated weights."""
    return tensors | {name: dequantize(p) for name, p in packed.items()}


@pytest.fixture(scope="module")
def calibrated(tensors):
    return calibrate(tensors)


def test_every_int4_weight_is_chosen_and_nothing_else(tensors, calibrated):
    packed, _ = calibrated
    assert packed.keys() == {n for n in tensors if INT4.format_of(n)}
    for name, p in packed.items():
        assert (p.format, tuple(p.shape)) == ("int4", tuple(tensors[name].shape))
        assert all(t.is_contiguous() for t in p.tensors().values())


def test_a_text_not_seen_fares_better_than_with_plain_or_searched_numbers(tensors, calibrated):
    unseen = tokens(seed=1)
    right = logits(tensors, unseen)

    def error(values):
        return float((logits(values, unseen) - right).square().mean())

    plain, searched = (
        error(
            tensors
            | {
                n: dequantize(search_int4(t) if s else quantize(t, "int4"))
                for n, t in tensors.items()
                if INT4.format_of(n)
            }
        )
        for s in (False, True)
    )
    assert error(outcome(tensors, calibrated[0])) < 0.8 * searched
    assert searched < plain


def test_first_and_last_inputs_are_those_of_the_network(tensors, calibrated):
    """wq, wk, wv see the normed embedding; the head sees the quantised network's output after the last norm."""
    packed, reached = calibrated
    x = torch.nn.functional.rms_norm(
        tensors["tok_embeddings.weight"][tokens()].flatten(0, 1),
        (ARGS.dim,),
        tensors["layers.0.attention_norm.weight"],
        ARGS.norm_eps,
    )
    stacked = torch.cat([tensors[f"layers.0.attention.{w}.weight"] for w in ("wq", "wk", "wv")])
    want = gptq(stacked, "int4", x.T @ x, len(x)).narrow(0, 0, 128)
    got = packed["layers.0.attention.wq.weight"]
    assert (dequantize(want) != dequantize(got)).float().mean() < 0.01  # another order of sums may flip a rounding

    decoder, seen = decoder_from_canonical(ARGS, "base", outcome(tensors, packed)), []
    decoder.output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, 1)))
    with torch.no_grad():
        router = decoder(tokens(), statistics=True).router
    want = gptq(tensors["output.weight"], "int4", seen[0].T @ seen[0], len(seen[0]))
    assert (dequantize(want) != dequantize(packed["output.weight"])).float().mean() < 0.01
    # Tokens are counted for the experts that the quantised network's routers choose.
    assert reached.counts == [[int(n) for n in layer.count_E] for layer in router]
    assert reached.tokens == tokens().numel()


def test_an_expert_is_calibrated_on_its_tokens_and_their_weight(tensors):
    """Another expert's numbers do not depend on a token that it does not get."""
    quant = Quant("int4")
    one, reached = calibrate(tensors, quant)
    scaled = {n: t * 2 if "experts.1." in n and n.startswith("layers.0") else t for n, t in tensors.items()}
    other, again = calibrate(scaled, quant)
    assert reached.counts[0] == again.counts[0]
    for e, same in ((0, True), (1, False), (2, True), (3, True)):
        name = f"layers.0.feed_forward.experts.{e}.w2.weight"
        assert torch.equal(one[name].data, other[name].data) == same
    assert torch.equal(
        one["layers.0.feed_forward.experts.1.w1.weight"].data, other["layers.0.feed_forward.experts.1.w1.weight"].data
    )  # doubled weights give the same int4 numbers


def test_parts_in_other_formats_are_run_as_those(tensors):
    packed, _ = calibrate(tensors, Quant("int4", "fp8"))
    assert packed.keys() == {n for n in tensors if ".experts." in n}
    rounded = {n: dequantize(quantize(t, "fp8")) if ".attention.w" in n else t for n, t in tensors.items()}
    same, _ = calibrate(rounded, Quant("int4"))
    assert all(torch.equal(p.data, same[n].data) for n, p in packed.items())


def test_int8_is_chosen_too_and_fares_better(tensors):
    quant, unseen = Quant("int8", "int8", "int8"), tokens(seed=1)
    packed, _ = calibrate(tensors, quant)
    assert packed.keys() == {n for n in tensors if quant.format_of(n)}
    assert {p.format for p in packed.values()} == {"int8"}
    right = logits(tensors, unseen)
    plain = logits(tensors | {n: dequantize(quantize(tensors[n], "int8")) for n in packed}, unseen)
    chosen = logits(outcome(tensors, packed), unseen)
    assert (chosen - right).square().mean() < 0.8 * (plain - right).square().mean()


def test_an_expert_without_tokens_is_refused_unless_allowed(tensors):
    one_token = torch.full((1, 8), 7)  # one token eight times reaches two experts of four
    with pytest.raises(ConfigError, match=r"no token of 8 reached layers\.0's expert \d, \d; give more of the text"):
        calibrate(tensors, tokens_BT=one_token)
    packed, reached = calibrate(tensors, tokens_BT=one_token, allow_unreached=True)
    none = reached.below(1)
    assert len(none) >= 2
    layer, expert, _ = none[0]
    name = f"layers.{layer}.feed_forward.experts.{expert}.w1.weight"
    plain = quantize(tensors[name], "int4")
    error = [(dequantize(p) - tensors[name]).square().sum() for p in (packed[name], plain)]
    assert error[0] < error[1]
    assert f"layers.{layer} expert {expert}" in reached.lines()[-1]


def test_what_is_said_about_experts():
    reached = Reached(1000, [[900, 700], [FEW_TOKENS, 50], [0, 2000]])
    assert reached.lines() == [
        "calibrated on 1000 tokens, of which an expert got 0 (layers.2, expert 0) to 2000 (layers.2, expert 1)",
        "fewer than 128 tokens: layers.1 expert 1 (50); a longer text would serve them better",
        "not reached, quantised without calibration: layers.2 expert 0",
    ]
    assert Reached(1000, [[900, 700]]).lines()[1:] == []
    many = Reached(10, [[1] * 12])
    assert many.lines()[1].endswith("expert 7 (1) and 4 more; a longer text would serve them better")


def test_what_cannot_be_calibrated(tensors):
    with pytest.raises(ConfigError, match="quant has none; give --quant int4"):
        Calibration(lazy(tensors), ARGS, Quant("nf4"), tokens())
    with pytest.raises(ConfigError, match=r"layers\.0\.attention\.wq\.bias stands beside a weight"):
        Calibration(lazy(tensors | {"layers.0.attention.wq.bias": torch.zeros(128)}), ARGS, INT4, tokens())
    broken = tensors | {"layers.0.attention_norm.weight": torch.full((128,), float("inf"))}
    with pytest.raises(CheckpointError, match=r"layers\.0: what comes out of it is not finite"):
        calibrate(broken, Quant(None, None, "int4"))
