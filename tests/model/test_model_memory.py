"""The planner's arithmetic against the network itself, numbers worked out by hand, and peaks that GPUs showed."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.adapt.peft import add_beside, besides_for, trainable_rule
from accessory.adapt.quant import Quant
from accessory.config import PRESETS, ModelArgs, MoEArgs
from accessory.engine.graphs import _power_of_two
from accessory.errors import ConfigError
from accessory.model.activations import Layer, Learning, experts_kept, layer_backward, layer_kept
from accessory.model.memory import (
    Formats,
    Inference,
    Setup,
    State,
    Training,
    cache_bytes,
    cache_slots,
    disk_bytes,
    is_trained,
    packed_bytes,
    pieces,
    trained_numbers,
    weight_bytes,
)
from accessory.model.peaks import estimate
from accessory.model.setups import FORMATS as SEARCHED
from accessory.model.setups import RESERVE, Card, card_of, smallest, smallest_of_each
from accessory.nn.cache import ContiguousCache
from accessory.nn.decoder import Decoder
from accessory.nn.experts_base import BaseExperts
from accessory.nn.experts_sparse import SparseExperts
from accessory.ops.quantized import FORMATS, packed_shapes
from accessory.ops.routing import route
from accessory.parallel.apply import local_part

BIG, TINY = PRESETS["8x7b"], PRESETS["tiny"]
RUN = Inference()
BOTH = ("base", "sparse")
# Sizes whose groups survive four cuts.
CUTTABLE = ModelArgs(
    dim=512, hidden_dim=1024, n_layers=3, n_heads=8, n_kv_heads=4, vocab_size=320, moe=MoEArgs(num_experts=4)
)


def running(args=BIG, quant=None, **changes):
    task = {k: changes.pop(k) for k in ("batch", "context", "prompt") if k in changes}
    return Setup(args=args, task=Inference(**task), formats=Formats.of(quant), **changes)


def finetuning(args=BIG, quant=None, implementation="sparse", tp=1, dp=1, **task):
    return Setup(
        args=args, task=Training(**task), formats=Formats.of(quant), implementation=implementation, tp=tp, dp=dp
    )


# --------------------------------------------------------------------------- weights and cache


@pytest.mark.parametrize(
    ("quant", "gb"), [(None, 93.41), ("int8", 46.87), ("fp8", 47.00), ("nf4", 26.65), ("int4", 24.84)]
)
def test_weights_of_mixtral(quant, gb):
    assert weight_bytes(running(quant=quant)) / 1e9 == pytest.approx(gb, abs=0.005)


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("name", ["8x7b", "8x22b"])
@pytest.mark.parametrize("implementation", BOTH)
def test_weights_are_those_that_quantising_counts(quant, name, implementation):
    setup = running(PRESETS[name], quant, implementation=implementation)
    assert weight_bytes(setup) == Quant.parse(quant).nbytes(PRESETS[name])
    assert weight_bytes(running(PRESETS[name])) == Quant().nbytes(PRESETS[name])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 128), (7, 256), (96, 1024)])
def test_packed_bytes_are_those_of_the_tensors(format, shape):
    tensors = packed_shapes(format, shape).values()
    assert packed_bytes(format, *shape) == sum(torch.Size(s).numel() * dtype.itemsize for s, dtype in tensors)


def test_rows_without_whole_groups_are_refused_as_quantising_does():
    for format, columns in itertools.product(FORMATS, (64, 96, 128, 192)):
        try:
            packed_shapes(format, (2, columns))
        except ConfigError:
            with pytest.raises(ConfigError, match=rf"^quant: {format} .* {columns}; use fewer ranks"):
                packed_bytes(format, 2, columns)
        else:
            packed_bytes(format, 2, columns)


def test_formats_are_read_as_quantising_reads_them():
    choices = (None, "none", *FORMATS)
    for words in itertools.product(choices, repeat=3):
        theirs = Quant.parse(*words) or Quant()
        assert vars(Formats.of(*words)) == vars(theirs), words


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    "args",
    [
        TINY,
        CUTTABLE,
        CUTTABLE.replace(lora_rank=4, bias_tuning=True, lora_targets=("wq", "wo", "w2", "gate", "output")),
    ],
)
def test_a_rank_holds_what_cutting_the_network_leaves_it(args, implementation, world):
    if world > 2 and args is TINY:
        world = 2
    with torch.device("meta"):
        decoder = Decoder(args, implementation)
        add_beside(decoder, besides_for(args))
    expected = Counter()
    for name, p in decoder.named_parameters():
        _, sizes = local_part(name, tuple(p.shape), args, implementation, 0, world)
        kind = "lora" if "lora" in name else "bias" if name.endswith("bias") else "weight"
        expected[kind] += torch.Size(sizes).numel()
    found = Counter()
    for piece in pieces(running(args, implementation=implementation, tp=world)):
        kind = "lora" if "lora" in piece.name else "bias" if piece.name.endswith("bias") else "weight"
        found[kind] += piece.numbers
    assert found == expected


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_is_trained_follows_the_trainer_s_rule(kind, norms):
    args = TINY.replace(lora_rank=4 if kind == "lora" else -1, norm_tuning=norms)
    with torch.device("meta"):
        decoder = Decoder(args, "sparse")
        add_beside(decoder, besides_for(args))
    rule = trainable_rule(args, kind == "lora")
    expected = sum(p.numel() for name, p in decoder.named_parameters() if rule(name))
    assert trained_numbers(finetuning(args, kind=kind)) == expected
    assert not any(is_trained(p, running(args)) for p in pieces(running(args)))


def test_the_cache_takes_128_kib_a_token():
    assert cache_bytes(running(context=4096)) == 4096 * 128 * 1024
    assert cache_bytes(running(context=4096, batch=3)) == 3 * 4096 * 128 * 1024
    assert cache_bytes(running(context=3000)) == 4096 * 128 * 1024  # a power of two, for the graphs
    assert cache_bytes(running(context=3000, tp=2)) == 3000 * 64 * 1024  # ranks have no graphs
    assert cache_bytes(running(context=3000, batch=65)) == 65 * 3000 * 128 * 1024


@pytest.mark.parametrize("context", [1, 255, 256, 257, 4000, 4096, 4097])
def test_slots_are_those_of_the_graphs_cache(context):
    assert cache_slots(running(context=context), context) == _power_of_two(context)


def test_the_cache_is_the_one_that_generation_makes():
    cache = ContiguousCache(TINY, 3, 256, "cpu", torch.bfloat16)
    assert cache_bytes(running(TINY, batch=3, context=200)) == cache.k.nbytes + cache.v.nbytes


def test_key_value_heads_that_ranks_share_are_there_on_each():
    args = CUTTABLE.replace(n_kv_heads=2)
    assert cache_bytes(running(args, context=100, tp=4)) == 2 * 2 * 3 * 100 * 1 * 64


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


# --------------------------------------------------------------------------- the search


def told(found):
    return [(f.setup.gpus, str(f.setup.formats)) for f in found]


def test_the_smallest_setups_that_run_mixtral():
    assert told(smallest(running(), card_of("H100"))) == [(1, "int8"), (1, "fp8"), (1, "nf4"), (1, "int4"), (2, "bf16")]
    assert told(smallest(running(), card_of("h200"), 1)) == [(1, "bf16")]
    assert told(smallest(running(), card_of("4090"), 2)) == [(2, "nf4"), (2, "int4")]
    assert smallest(running(), Card("one 4090", card_of("4090").nbytes, 1)) == []


def test_the_smallest_setup_that_trains_mixtral_in_full():
    first = smallest(finetuning(kind="full"), card_of("H100"))[0].setup
    assert (first.gpus, first.task.data_parallel, first.task.checkpointing) == (16, "fsdp", True)


@settings(max_examples=15, deadline=None)
@given(
    gb=st.floats(8, 200),
    kind=st.sampled_from([None, "full", "lora"]),
    quant=st.sampled_from(SEARCHED),
)
def test_what_is_found_fits_and_is_in_order(gb, kind, quant):
    card = Card("any", int(gb * 1e9))
    setup = running(quant=quant) if kind is None else finetuning(BIG.replace(lora_rank=16), kind=kind)
    found = smallest(setup, card)
    assert [f.setup.gpus for f in found] == sorted(f.setup.gpus for f in found)
    assert len(set(told(found))) == len(found) <= 5
    for f in found:
        assert f.margin >= RESERVE * card.nbytes
        assert f.estimate == estimate(f.setup)
        assert f.setup.task.kind == kind if kind else isinstance(f.setup.task, Inference)


def test_formats_chosen_part_by_part_are_among_what_is_tried():
    mixed = Setup(args=BIG, task=RUN, formats=Formats.of("int4", "int8", "int8"))
    first = smallest_of_each(mixed, [card_of("H100")])[0]
    assert first.setup.formats == mixed.formats
    assert str(mixed.formats) == "experts int4, attention int8, output int8"


def test_an_unknown_card_is_named_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"card: got 'H1000', but known are .*H100.*--memory"):
        card_of("H1000")


def test_short_prompts_unpack_no_stacks():
    """As many rows an expert as products unpack inside need no 16-bit stack; one more row does."""
    from accessory.model import peaks
    from accessory.ops import grouped, quantized

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
