"""The planner's peak memory, against peaks measured on GPUs and numbers worked out by hand."""

from dataclasses import replace

import pytest
from helpers.plans import BIG, BOTH, CUTTABLE, TINY, finetuning, running
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accessory.limits import TILED_ROWS_AN_EXPERT
from accessory.planner import activations
from accessory.planner.peak import GRAPHS, WORKSPACE, estimate
from accessory.planner.search import TRIED_FORMATS
from accessory.planner.setup import ParameterBytes
from accessory.planner.weights import tensor_groups

TWO_LAYERS = BIG.replace(n_layers=2)
WITH_LORA = TWO_LAYERS.replace(lora_rank=16, lora_alpha=16.0, norm_tuning=False)
SIXTEEN_BITS = ParameterBytes(weight=2, gradient=2, moments=0, copy=0)


# benchmarks/README.md: one H200, 2 layers of Mixtral-8x7B, 2 rows.
@pytest.mark.parametrize(
    ("what", "tokens", "recomputing", "implementation", "more", "measured"),
    [
        ("passes", 2048, False, "sparse", {}, 13.3),
        ("passes", 2048, False, "base", {}, 13.3),
        ("passes", 2048, True, "sparse", {}, 13.1),
        ("full", 2048, False, "sparse", {}, 52.93),
        ("full", 2048, False, "base", {}, 52.93),
        ("full", 2048, False, "sparse", {"accum_iter": 2}, 59.44),
        ("full", 2048, True, "sparse", {}, 52.6),
        ("full", 8192, False, "sparse", {}, 56.20),
        ("full", 8192, False, "base", {}, 56.20),
        ("lora", 2048, False, "sparse", {"cuda_graphs": False}, 8.53),
        ("lora", 2048, False, "base", {"cuda_graphs": False}, 8.53),
        ("lora", 2048, False, "sparse", {"packing": True, "cuda_graphs": False}, 8.63),
        ("lora", 2048, True, "sparse", {"cuda_graphs": False}, 7.71),
        ("passes", 2048, False, "sparse", {"cuda_graphs": True}, 15.1),
        ("passes", 2048, True, "sparse", {"cuda_graphs": True}, 13.9),
        ("full", 2048, False, "sparse", {"cuda_graphs": True}, 59.4),
        ("full", 2048, True, "sparse", {"cuda_graphs": True}, 54.6),
        ("lora", 2048, False, "sparse", {}, 8.7),
        ("lora", 2048, True, "sparse", {}, 8.0),
    ],
)
def test_measured_training_steps(what, tokens, recomputing, implementation, more, measured):
    assert trained(what, tokens, recomputing, implementation, more) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("recomputing", "implementation", "measured"),
    [(False, "sparse", 14.15), (False, "base", 14.15), (True, "sparse", 11.05)],
)
def test_measured_steps_of_lora_in_one_piece(recomputing, implementation, measured, monkeypatch):
    """They were measured when the experts made all they need of all pairs at once. In pieces, these steps take less;
    that has not been measured."""
    in_pieces = trained("lora", 8192, recomputing, implementation, {"cuda_graphs": False})
    monkeypatch.setattr(activations, "TRAINED_PAIRS_AT_ONCE", 2 * 2 * 8192)
    in_one = trained("lora", 8192, recomputing, implementation, {"cuda_graphs": False})
    assert in_one == pytest.approx(measured, rel=0.05)
    assert in_pieces < in_one


def trained(what, tokens, recomputing, implementation, more):
    """GB of a step of two rows."""
    setup = finetuning(
        WITH_LORA if what == "lora" else TWO_LAYERS,
        kind="lora" if what == "lora" else "full",
        batch_size=2,
        max_words=tokens,
        checkpointing=recomputing,
        parameter=SIXTEEN_BITS if what == "passes" else ParameterBytes(),
        implementation=implementation,
        **{"packing": False, **more},
    )
    return estimate(setup).allocated / 1e9


# benchmarks/README.md, "What accessory plan predicts": 2 layers of Mixtral-8x7B on one card of capability 9.0.
@pytest.mark.parametrize(
    ("context", "measured"),
    [(2048, 4.24), (16384, 5.11)],
)
def test_measured_prompts_in_fp8(context, measured):
    setup = running(TWO_LAYERS, "fp8", context=context, prompt=context - 48)
    assert estimate(setup).allocated / 1e9 == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("quant", [None, "fp8", "int4"])
@pytest.mark.parametrize("context", [2048, 16384])
def test_prompts_in_base_take_what_they_take_in_sparse(context, quant):
    """On one card and without gradients, both compute all experts as grouped products."""
    sparse, base = (
        estimate(running(TWO_LAYERS, quant, context=context, prompt=context - 48, implementation=i)).allocated
        for i in ("sparse", "base")
    )
    assert base == sparse


def test_a_rank_of_base_sorts_the_pairs_of_all_ranks():
    def activations(tp):
        return estimate(running(TWO_LAYERS, context=4096, tp=tp, implementation="base")).terms["activations"]

    sorted_pairs = 2 * 4095 * 2 * (BIG.dim + 3 * BIG.hidden_dim)  # rows of x and three hidden tensors, 16 bits
    assert min(activations(1), activations(4)) > sorted_pairs


@pytest.mark.parametrize(
    ("tokens", "recomputing", "measured"),
    [
        (1024, False, 2.94),
        (1040, True, 4.56),  # more than 256 rows an expert: its weights are dequantised before the product
        (1040, False, 3.83),
        (4096, True, 5.21),
        (4096, False, 5.18),
    ],
)
def test_measured_qlora_steps_over_nf4(tokens, recomputing, measured):
    task = {"kind": "lora", "batch_size": 2, "max_words": tokens // 2, "packing": False, "checkpointing": recomputing}
    assert estimate(finetuning(WITH_LORA, "nf4", **task)).allocated / 1e9 == pytest.approx(measured, rel=0.05)


def test_a_resident_model_as_measured():
    """benchmarks/README.md: 93.4 GB of weights on an H200."""
    found = estimate(running(batch=1, context=176, prompt=128))
    assert found.terms["weights"] / 1e9 == pytest.approx(93.4, abs=0.05)
    assert found.allocated / 1e9 < 93.4 * 1.01


@pytest.mark.parametrize(("quant", "measured"), [("nf4", 34.6), ("int4", 32.7)])
def test_qlora_of_the_real_size_as_measured(quant, measured):
    """All 32 layers, a row of 2048 tokens, one H200."""
    args = BIG.replace(lora_rank=16, norm_tuning=False)
    setup = finetuning(args, quant, kind="lora", batch_size=1, max_words=2048, packing=False, checkpointing=True)
    assert estimate(setup).allocated / 1e9 == pytest.approx(measured, rel=0.05)


def test_sixteen_bytes_a_trained_number():
    """With a large vocabulary and few tokens, the optimiser's step is the largest moment. It makes no tensors."""
    args = TINY.replace(vocab_size=4096)
    found = estimate(finetuning(args, kind="full", batch_size=1, max_words=2))
    assert found.moment == "the optimiser's step"
    total = args.parameter_counts()[0]
    held = {"weights": 4 * total, "optimiser": 8 * total, "gradients": 4 * total}
    assert {name: found.terms[name] for name in held} == held
    assert found.allocated == 16 * total + WORKSPACE


def test_sharding_divides_what_it_shards():
    whole = finetuning(CUTTABLE, kind="full", checkpointing=True)
    shared = finetuning(CUTTABLE, kind="full", checkpointing=True, dp=4, data_parallel="fsdp")
    fp32 = sum(group.numel for group in tensor_groups(whole) if group.role == "fp32")
    total = CUTTABLE.parameter_counts()[0]
    assert estimate(shared).terms["optimiser"] == pytest.approx(8 * ((total - fp32) / 4 + fp32), rel=1e-3)
    frozen = finetuning(CUTTABLE.replace(lora_rank=4), kind="lora", dp=4)
    assert estimate(frozen).terms["weights"] > 2 * (total - fp32)  # sdp does not shard frozen weights


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 40),
    context=st.integers(2, 20000),
    more=st.integers(1, 20000),
    quant=st.sampled_from(TRIED_FORMATS),
    implementation=st.sampled_from(BOTH),
    tp=st.sampled_from([1, 2, 4]),
)
@example(batch=1, context=2, more=40, quant="fp8", implementation="base", tp=1)  # loading and running are almost equal
def test_more_to_run_never_takes_less(batch, context, more, quant, implementation, tp):
    def total(**changes):
        values = {"batch": batch, "context": context, "tp": tp, "args": CUTTABLE, "quant": quant}
        return estimate(running(implementation=implementation, **{**values, **changes})).total

    assert total(context=context + more) >= total()
    assert total(args=CUTTABLE.replace(n_layers=4)) > total()
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


@pytest.mark.parametrize(
    ("prompt", "graph", "beside"),
    [
        (None, 1024, 4095),  # any part of the context: short ones are graphs, and the longest is none
        (100, 128, 0),  # a graph has room for the next larger number
        (1024, 1024, 0),
        (1025, 0, 1025),
        (4096, 0, 4096),
        (4097, 32, 4096),  # what does not fit a step goes on in the next one
    ],
)
def test_steps_that_are_graphs_keep_their_memory(prompt, graph, beside):
    def terms(prompt, context=4096):
        return estimate(running(quant="int4", context=max(context, (prompt or 0) + 1), prompt=prompt)).terms

    def of(tokens):
        """What a step of so many tokens takes, as a graph or without."""
        return terms(tokens).get("activations" if tokens > 1024 else GRAPHS, 0) if tokens else 0

    found = terms(prompt)
    assert (found.get(GRAPHS, 0), found.get("activations", 0)) == (of(graph), of(beside))
    assert (found.get(GRAPHS, 0) > 0) == bool(graph)
    assert (found.get("activations", 0) > 0) == bool(beside)
    on_cpu = replace(running(quant="int4", context=4096, prompt=100), device="cpu")
    assert GRAPHS not in estimate(on_cpu).terms


def test_short_prompts_unpack_no_stacks():
    """A product dequantises tile by tile up to a number of rows per expert. One row more needs a 16-bit stack."""

    def activations(prompt):
        terms = estimate(running(quant="int4", context=4096, prompt=prompt)).terms
        return terms.get("activations", 0) + terms.get(GRAPHS, 0)

    stack = 2 * BIG.moe.num_experts * BIG.hidden_dim * BIG.dim
    rows = TILED_ROWS_AN_EXPERT * BIG.moe.num_experts // BIG.moe.num_experts_per_tok
    assert activations(rows) < stack < activations(rows + 1)
