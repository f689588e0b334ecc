"""Quantised networks: every expert but never the router; any number of ranks loads the same quantised weights."""

import pytest
import torch
from helpers.distributed import run_ranks
from helpers.quantized import FORMAT_AND_IMPLEMENTATION
from helpers.random_models import canonical_from_hf, decoder_from_canonical, hf_mixtral
from helpers.sizes import CUTTABLE

from accessory.build.network import NetworkSpec, TrainingSpec, build
from accessory.checkpoint.folder import Checkpoint
from accessory.checkpoint.lazy import Constant
from accessory.config import LlamaType, ModelArgs
from accessory.errors import ConfigError
from accessory.formats import FORMATS, Quant
from accessory.nn.linear import PackedWeight
from accessory.ops.quantized import dequantize, quantize
from accessory.parallel.mesh import DeviceMesh

# Four ranks can cut these sizes without cutting through a group.
ARGS = CUTTABLE
TOKENS_BT = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tensors():
    return {n: t.clone() for n, t in canonical_from_hf(hf_mixtral(ARGS)).items()}


def load(tensors, implementation, quant, ranks=None, args=ARGS, adapters=None, trainable=None):
    checkpoint = Checkpoint(
        path="memory",
        layout="hf",
        args=args,
        llama_type=LlamaType(implementation),
        tensors={n: Constant(t) for n, t in tensors.items()},
        files=[],
    )
    spec = NetworkSpec(checkpoints=[checkpoint], args=args, implementation=implementation, quant=quant)
    training = TrainingSpec(trainable=trainable, adapters=adapters) if trainable else None
    return build(spec, DeviceMesh(model=ranks), dtype=torch.float32, training=training)


@FORMAT_AND_IMPLEMENTATION
def test_the_network_is_that_of_the_dequantized_weights(tensors, format, implementation):
    quant = Quant.parse(format, output="int8")
    rounded = {
        name: dequantize(quantize(t, quant.format_of(name))) if quant.format_of(name) else t
        for name, t in tensors.items()
    }
    want = decoder_from_canonical(ARGS, implementation, rounded)(TOKENS_BT).logits
    decoder = load(tensors, implementation, quant)
    torch.testing.assert_close(decoder(TOKENS_BT).logits, want, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(decoder(TOKENS_BT[:1, :1]).logits, want[:1, :1], rtol=1e-4, atol=1e-4)


@FORMAT_AND_IMPLEMENTATION
def test_every_expert_is_quantized_and_the_router_never(tensors, format, implementation):
    decoder = load(tensors, implementation, Quant.parse(format))
    packed = {name: m for name, m in decoder.named_modules() if isinstance(m, PackedWeight)}
    wanted = {f"layers.{i}.feed_forward.experts.{w}" for i in range(2) for w in ("w1", "w2", "w3")}
    wanted |= {f"layers.{i}.attention.{w}.weight" for i in range(2) for w in ("wq", "wk", "wv", "wo")}
    assert packed.keys() == wanted | ({"output.weight"} if format == "int8" else set())
    for i in range(2):  # the router has the checkpoint's bytes
        gate = decoder.get_parameter(f"layers.{i}.feed_forward.gate.weight")
        assert torch.equal(gate, tensors[f"layers.{i}.feed_forward.gate.weight"])
    experts = sum(m.packed().nbytes for name, m in packed.items() if ".experts." in name)
    per_number = {"int8": 1 + 4 / 512, "fp8": 1 + 4 / 512, "int4": 0.5 + 3 / 128, "nf4": 0.5 + 4 / 64}
    per_number["nf4-dq"] = 0.5 + 1 / 64 + 2 * 4 / 512
    assert experts == 2 * 4 * 3 * 512 * 512 * per_number[format]
    held = sum(p.numel() * p.element_size() for p in decoder.parameters())
    assert held == Quant.parse(format).nbytes(ARGS, bytes_16=4)


def on_ranks(rank, world, tensors, formats):
    import torch.distributed as dist

    from accessory.parallel.mesh import Ranks

    ranks = Ranks.of(dist.group.WORLD)
    with torch.no_grad():
        return {
            (format, implementation): load(tensors, implementation, Quant.parse(format, output="int8"), ranks)(
                TOKENS_BT
            ).logits.clone()
            for format in formats
            for implementation in ("base", "sparse")
        }


@pytest.mark.parametrize(
    ("world", "formats"),
    [(2, ("int4", "fp8")), *(pytest.param(world, FORMATS, marks=pytest.mark.slow) for world in (2, 4))],
)
def test_ranks_hold_slices_of_the_quantized_whole(tensors, world, formats):
    alone = {}
    for format in formats:
        for implementation in ("base", "sparse"):
            decoder = load(tensors, implementation, Quant.parse(format, output="int8"))
            alone[format, implementation] = decoder(TOKENS_BT).logits.detach()
    for result in run_ranks(on_ranks, world, tensors, formats):
        for key, logits in result.items():
            torch.testing.assert_close(logits, alone[key], rtol=1e-5, atol=1e-5, msg=str(key))


def test_a_size_that_ranks_would_cut_through_a_group_is_an_error(tensors):
    from accessory.adapt.quant import quantize_skeleton
    from accessory.nn.decoder import Decoder
    from accessory.parallel.apply import parallelize
    from accessory.parallel.mesh import Ranks

    with torch.device("meta"):
        decoder = Decoder(ARGS.replace(hidden_dim=256), "sparse")
    parallelize(decoder, Ranks(None, 1, 4))
    with pytest.raises(ConfigError, match=r"layers\.0\.feed_forward\.experts\.w2: quant: int4 scales 128"):
        quantize_skeleton(decoder, Quant.parse("int4"))


def test_rows_that_one_rank_cannot_quantize_are_no_matter_of_ranks():
    from accessory.adapt.quant import quantize_skeleton
    from accessory.nn.decoder import Decoder

    with torch.device("meta"):
        decoder = Decoder(ARGS.replace(dim=192), "base")
    with pytest.raises(ConfigError) as error:
        quantize_skeleton(decoder, Quant.parse("int4"))
    assert str(error.value) == (
        "layers.0.attention.wq.weight: its rows of 192 numbers are no whole groups of 128, which int4 scales together; "
        "int8 and fp8 scale rows"
    )


def test_what_quant_says():
    assert Quant.parse(False) is None
    assert Quant.parse("none") is None
    assert Quant.parse(True) == Quant("nf4", "nf4", None)
    assert Quant.parse("int8") == Quant("int8", "int8", "int8")
    assert Quant.parse("int4", attention="int8", output="int4") == Quant("int4", "int8", "int4")
    assert Quant.parse("int4", attention="none") == Quant("int4", None, None)
    assert Quant.from_dict(Quant("int4", "int8").to_dict()) == Quant("int4", "int8")
    with pytest.raises(ConfigError, match="quant: got 'int3', but it must be one of int8, fp8, int4, nf4"):
        Quant.parse("int3")
    with pytest.raises(ConfigError, match="unknown key 'router'"):
        Quant.from_dict({"router": "int8"})


def test_the_real_sizes_come_to_the_arithmetic():
    """8x7B in GB: int8 takes 1 byte a weight, except the embedding; int4 takes 0.523 (groups of 128, 16-bit head)."""
    assert Quant.parse("int8").nbytes(ModelArgs()) / 1e9 == pytest.approx(46.9, abs=0.1)
    assert Quant.parse("int4").nbytes(ModelArgs()) / 1e9 == pytest.approx(24.83, abs=0.03)
    assert Quant.parse("nf4").nbytes(ModelArgs()) / 1e9 == pytest.approx(26.65, abs=0.03)
    assert Quant.parse("nf4-dq").nbytes(ModelArgs()) / 1e9 == pytest.approx(24.57, abs=0.03)
    assert Quant().nbytes(ModelArgs()) / 1e9 == pytest.approx(93.4, abs=0.1)


@pytest.mark.parametrize("implementation", ["base", "sparse"])
def test_lora_learns_beside_quantized_experts(tensors, implementation):
    """LoRA gets the same gradients with quantised experts as with their dequantised weights."""
    from accessory.adapt.peft import adapter_specs_for, trainable_rule

    args = ARGS.replace(lora_rank=4)
    grads = []
    quant = Quant.parse("nf4")
    rounded = {
        name: dequantize(quantize(t, quant.format_of(name))) if quant.format_of(name) else t
        for name, t in tensors.items()
    }
    for values, q in ((tensors, quant), (rounded, None)):
        decoder = load(
            values,
            implementation,
            q,
            args=args,
            adapters=adapter_specs_for(args),
            trainable=trainable_rule(args, peft=True),
        )
        with torch.no_grad():
            for name, p in decoder.named_parameters():
                if "lora_b" in name:
                    p.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        decoder(TOKENS_BT).logits.square().mean().backward()
        grads.append({n: p.grad for n, p in decoder.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert sum("lora" in name for name in grads[0]) == 2 * 2 * 7
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()), msg=name)
