"""What the planner says that passes take: what autograd keeps, numbers worked out by hand, and peaks GPUs showed."""

import pytest
import torch
from helpers.plans import BIG, BOTH, CUTTABLE, TINY, finetuning, running
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.config import PRESETS
from accessory.nn.experts_base import BaseExperts
from accessory.nn.experts_sparse import SparseExperts
from accessory.ops.routing import route
from accessory.planner.activations import Layer, Learning, experts_kept, layer_backward, layer_kept
from accessory.planner.memory import Formats, Inference, Setup, State, disk_bytes, pieces
from accessory.planner.peaks import estimate
from accessory.planner.setups import FORMATS as SEARCHED

# --------------------------------------------------------------------------- activations


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", [SparseExperts, BaseExperts])
def test_what_autograd_keeps_of_experts(kind, lora):
    """Every float tensor that backward waits for, but weights, what LoRA's rank is a size of, and routing."""
    D, F, E, K, T, rank = 64, 96, 4, 2, 128, 5
    experts = kind(D, F, E)
    for name in ("w1", "w2", "w3") if lora else ():
        experts.add_lora(name, rank, 1.0)
    for name, p in experts.named_parameters():
        p.data = torch.randn(p.shape, dtype=torch.bfloat16 if lora and "lora" not in name else torch.float32) * 0.1
        p.requires_grad_(not lora or "lora" in name)
    experts.compute_dtype = torch.bfloat16
    torch.manual_seed(0)
    x_TD, logits_TE = torch.randn(T, D, requires_grad=True), torch.randn(T, E, requires_grad=True)
    weight_TK, expert_TK, _ = route(logits_TE, K)
    weights = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    held, kept = [], {}

    def keep(tensor):
        held.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point() and not {1, rank} & set(tensor.shape):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(x_TD, weight_TK, expert_TK)
    layer = Layer(T, T * K, D, F, D, D, E, one_by_one=kind is BaseExperts)
    copies = 0 if lora else 2 * 3 * layer.stack
    learning = Learning(weights=not lora, experts_lora=lora)
    assert sum(kept.values()) == experts_kept(layer, learning) + copies


def test_a_layer_of_mixtral_by_hand():
    """One token's bytes, two experts a token, all trained."""
    D, F = 4096, 14336
    layer = Layer(1, 2, D, F, D, 1024, 8, one_by_one=False)
    learning = Learning(weights=True, gate=True, packing=False)
    stream = 2 * 4 * D + 2 * D  # the input and the sum behind attention; attention's input
    attention = 2 * (D + 1024) + 2 * 1024 + 2 * D  # queries and keys, values, the outcome
    experts = 4 * D + 2 * 2 * D + 4 * 2 * 2 * F + 2 * 4 * D  # the router's input, sorted rows, SwiGLU, fp32 outcomes
    assert layer_kept(layer, learning) == stream + attention + experts == 356352


def test_backward_of_trained_experts_ends_with_all_gradients_and_one_being_made():
    """12 bytes a number of gradients (w1, w2, w3 of which the last is there in 16 bits too) and its copy."""
    layer = Layer(1, 2, 4096, 14336, 4096, 1024, 8, one_by_one=False)
    back = layer_backward(layer, Learning(weights=True))
    assert back.gradients == (4 + 4 + 4 + 2) * layer.stack
    assert back.copies == 2 * (layer.stack + layer.attention)


# --------------------------------------------------------------------------- peaks

TWO_LAYERS = BIG.replace(n_layers=2)
WITH_LORA = TWO_LAYERS.replace(lora_rank=16, lora_alpha=16.0, norm_tuning=False)
SIXTEEN_BITS = State(weight=2, gradient=2, moments=0, copy=0)


# benchmarks/README.md, "A training step": one H100, 2 layers of Mixtral-8x7B, 2 × 2048 tokens.
@pytest.mark.parametrize(
    ("what", "recomputing", "implementation", "measured"),
    [
        ("passes", False, "sparse", 13.2),
        ("passes", False, "base", 13.7),
        ("passes", True, "sparse", 13.2),
        ("passes", True, "base", 13.7),
        ("full", False, "sparse", 52.6),
        ("full", False, "base", 52.6),
        ("full", True, "sparse", 52.6),
        ("full", True, "base", 52.6),
        ("lora", False, "sparse", 10.3),
        ("lora", False, "base", 10.6),
        ("lora", True, "sparse", 8.5),
        ("lora", True, "base", 8.4),
    ],
)
def test_measured_training_steps(what, recomputing, implementation, measured):
    setup = finetuning(
        WITH_LORA if what == "lora" else TWO_LAYERS,
        kind="lora" if what == "lora" else "full",
        batch_size=2,
        max_words=2048,
        packing=False,
        checkpointing=recomputing,
        state=SIXTEEN_BITS if what == "passes" else State(),
        implementation=implementation,
    )
    assert estimate(setup).allocated / 1e9 == pytest.approx(measured, rel=0.05)


def test_a_resident_model_as_measured():
    """benchmarks/README.md: 93.4 GB of weights on an H200."""
    found = estimate(running(batch=1, context=176, prompt=128))
    assert found.terms["weights"] / 1e9 == pytest.approx(93.4, abs=0.05)
    assert found.allocated / 1e9 < 93.4 * 1.01


def test_qlora_of_the_real_size_stays_under_45_gb():
    args = BIG.replace(lora_rank=16, norm_tuning=False)
    for quant in ("nf4", "int4"):
        setup = finetuning(args, quant, kind="lora", batch_size=1, max_words=2048, checkpointing=True)
        assert 25e9 < estimate(setup).allocated < 45e9


def test_sixteen_bytes_a_trained_number_and_the_squares_of_a_gradient():
    """With a large vocabulary and few tokens, the optimiser's step is the largest moment."""
    args = TINY.replace(vocab_size=4096)
    found = estimate(finetuning(args, kind="full", batch_size=1, max_words=2))
    assert found.moment == "the optimiser's step"
    held = {name: found.terms[name] for name in ("weights", "optimiser", "gradients", "a gradient's squares")}
    total = args.parameter_counts()[0]
    largest = 4096 * 64
    assert held == {
        "weights": 4 * total,
        "optimiser": 8 * total,
        "gradients": 4 * total,
        "a gradient's squares": 4 * largest,
    }


def test_sharding_divides_what_it_shards():
    whole = finetuning(CUTTABLE, kind="full", checkpointing=True)
    shared = finetuning(CUTTABLE, kind="full", checkpointing=True, dp=4, data_parallel="fsdp")
    fp32 = sum(p.numbers for p in pieces(whole) if p.role == "fp32")
    total = CUTTABLE.parameter_counts()[0]
    assert estimate(shared).terms["optimiser"] == pytest.approx(8 * ((total - fp32) / 4 + fp32), rel=1e-3)
    frozen = finetuning(CUTTABLE.replace(lora_rank=4), kind="lora", dp=4)
    assert estimate(frozen).terms["weights"] > 2 * (total - fp32)  # sdp leaves a frozen base whole


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 40),
    context=st.integers(2, 20000),
    more=st.integers(1, 20000),
    quant=st.sampled_from(SEARCHED),
    implementation=st.sampled_from(BOTH),
    tp=st.sampled_from([1, 2, 4]),
)
def test_more_to_run_never_takes_less(batch, context, more, quant, implementation, tp):
    def total(**changes):
        values = {"batch": batch, "context": context, "tp": tp, "args": CUTTABLE, "quant": quant}
        return estimate(running(implementation=implementation, **{**values, **changes})).total

    assert total(context=context + more) >= total()
    assert total(args=CUTTABLE.replace(n_layers=4)) > total()
    largest = 64 if implementation == "sparse" else 4  # 8 pairs, which base decodes in place
    if tp > 1 or batch + more > largest >= batch:
        return  # beyond so many sequences, and on several ranks, caches are no longer rounded up
    assert total(batch=batch + more) >= total()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["full", "lora"]),
    rows=st.integers(1, 8),
    tokens=st.integers(2, 4096),
    more=st.integers(1, 4096),
    implementation=st.sampled_from(BOTH),
    dp=st.sampled_from([1, 2, 8]),
    mode=st.sampled_from(["sdp", "fsdp"]),
)
def test_more_to_train_never_takes_less(kind, rows, tokens, more, implementation, dp, mode):
    args = CUTTABLE.replace(lora_rank=8 if kind == "lora" else -1)

    def total(args=args, **changes):
        values = {"kind": kind, "batch_size": rows, "max_words": tokens, "dp": dp, "data_parallel": mode}
        return estimate(finetuning(args, implementation=implementation, **{**values, **changes})).total

    assert total(max_words=tokens + more) >= total()
    assert total(batch_size=rows + 1) >= total()
    assert total(accum_iter=2) >= total()
    assert total(checkpointing=True) <= total()
    assert total(args.replace(n_layers=5)) > total()
    if kind == "lora":
        assert total(args.replace(lora_rank=64)) >= total()


def test_disk_of_a_finetune():
    setup = finetuning(TINY, kind="full")
    total = TINY.parameter_counts()[0]
    assert disk_bytes(setup, 1234) == {"model": 1234, "states": 3 * 12 * total, "result": 2 * total}
    assert disk_bytes(running(TINY)) == {"model": 2 * total}


def test_short_prompts_unpack_no_stacks():
    """As many rows an expert as products unpack inside need no 16-bit stack; one more row does."""
    from accessory.ops import grouped, quantized
    from accessory.planner import peaks

    assert (peaks.TILED_ROWS, peaks.TILED_ROWS_BASE) == (grouped.TILED_ROWS, quantized.TILED_ROWS_GPU)
    args = PRESETS["8x7b"]

    def activations(prompt, implementation="sparse"):
        task = Inference(context=4096, prompt=prompt)
        setup = Setup(args=args, task=task, implementation=implementation, formats=Formats.of("int4"))
        return peaks._inference(setup)["reading the prompt"]["activations"]

    stack = 2 * args.moe.num_experts * args.hidden_dim * args.dim
    assert activations(1024) < stack < activations(1028)  # of two experts each: 256 rows an expert, and more
    one = 2 * args.hidden_dim * args.dim
    assert activations(1028, "base") - activations(1024, "base") < one / 4  # one expert at a time, all beyond 128 rows
