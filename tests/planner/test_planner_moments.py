"""The bytes of moments and gradients, by hand, and what fits 8 cards of 80 GB."""

from dataclasses import replace

import pytest
from helpers.plans import BIG, CUTTABLE, TINY, finetuning
from helpers.sizes import CUTTABLE as ROWS_OF_512

from accessory.errors import ConfigError, InputError
from accessory.launch.memory import HOST, Room
from accessory.limits import LOGITS_AT_ONCE, OPTIMIZER_PIECE, PIECES_ON_THE_WAY
from accessory.planner.cards import Card
from accessory.planner.fit import check_host, what_fits
from accessory.planner.host import disk_bytes, host_bytes
from accessory.planner.moments import check_blocks, in_8_bits, moment_bytes, offloaded_bytes
from accessory.planner.peak import estimate
from accessory.planner.search import smallest
from accessory.planner.training import training_moments
from accessory.planner.weights import is_trained, tensor_groups

EIGHT, BF16, HOST_MOMENTS = {"optimizer": "adamw_8bit"}, {"gradient_dtype": "bf16"}, {"offload": "optimizer"}


def full(args=BIG, **task):
    return finetuning(args, kind="full", **{"batch_size": 1, "checkpointing": True, **task})


def step(setup):
    """The terms of the optimiser's step."""
    return training_moments(setup, setup.task)["the optimiser's step"]


# Norms: 2 a layer and the last one, 4096 numbers each; routers: 8 × 4096 a layer.
SMALL = 32 * (2 + 8) * 4096 + 4096
LARGE = 46_702_792_704 - SMALL


def test_a_number_s_moments_take_two_bytes_and_a_scale_for_256():
    terms = step(full(**EIGHT))
    assert terms["optimiser"] == 8 * SMALL + 2 * LARGE + 8 * LARGE // 256
    assert terms["gradients"] == 4 * (SMALL + LARGE)
    assert terms["pieces that are updated"] == 0


def test_gradients_in_bf16_take_two_bytes_but_those_of_norms_and_routers():
    terms = step(full(**BF16))
    assert terms["gradients"] == 4 * SMALL + 2 * LARGE
    assert terms["optimiser"] == 8 * (SMALL + LARGE)
    assert terms["pieces that are updated"] == 4 * OPTIMIZER_PIECE  # one widened piece


@pytest.mark.parametrize(
    ("task", "bytes_each"),
    [
        ({}, 2),  # the 16-bit gradient, beside the fp32 one that `gradients` counts
        (BF16, 4),  # the same two tensors, of which the 16-bit one is what stays
        ({"max_words": 2**20}, 6),  # the second piece makes both, and the sum of the pieces is there
        ({"dp": 2}, 2),  # FSDP2 takes the 16-bit gradient
        ({"dp": 2, "max_words": 2**20}, 4),
    ],
)
def test_gradients_of_the_head_while_they_are_made(task, bytes_each):
    setup = full(TINY, **{"max_words": 8, **task})
    logits = 2 * min(LOGITS_AT_ONCE, setup.task.max_words * TINY.vocab_size)
    numel = TINY.vocab_size * TINY.dim
    assert training_moments(setup, setup.task)["the end of forward"]["logits"] == logits + bytes_each * numel


@pytest.mark.parametrize("tokens", [8, 2**21])
def test_ranks_that_share_the_vocabulary_have_a_part_of_the_logits(tokens):
    """And of the head. A piece has as many numbers on each rank, so its rows are more."""
    setup = full(TINY, tp=2, max_words=tokens)
    logits = 2 * min(LOGITS_AT_ONCE, tokens * TINY.vocab_size // 2)
    head = (2 if tokens == 8 else 6) * TINY.vocab_size // 2 * TINY.dim
    assert training_moments(setup, setup.task)["the end of forward"]["logits"] == logits + head


def test_moments_on_the_host_leave_three_buffers_on_the_card():
    setup = full(dp=8, data_parallel="fsdp", **HOST_MOMENTS)
    terms = step(setup)
    assert terms["optimiser"] == 0
    assert terms["pieces that are updated"] == PIECES_ON_THE_WAY * 8 * OPTIMIZER_PIECE == 201_326_592
    held = 8 * (SMALL + LARGE // 8)
    assert offloaded_bytes(setup) == held
    assert host_bytes(setup) == host_bytes(full(dp=8, data_parallel="fsdp")) + 8 * held


def test_on_a_cpu_moments_are_where_they_were():
    from dataclasses import replace

    setup = replace(full(TINY, **HOST_MOMENTS), device="cpu")
    assert offloaded_bytes(setup) == 0
    assert step(setup)["optimiser"] == 8 * TINY.parameter_counts()[0]


@pytest.mark.parametrize(
    ("name", "shape", "eight"),
    [
        ("layers.0.attention.wq.weight", (4096, 4096), True),
        ("layers.0.feed_forward.experts.w1", (8, 14336, 4096), True),
        ("output.weight", (32000, 4096), True),
        ("layers.0.attention.wq.lora_a.weight", (16, 4096), True),
        ("layers.0.attention.wq.lora_a.weight", (8, 256), False),  # 2048 numbers
        ("layers.0.attention.wq.lora_b.weight", (4096, 16), False),  # rows are no whole blocks
        ("layers.0.attention_norm.weight", (4096,), False),
        ("layers.0.feed_forward.gate.weight", (8, 4096), False),
        ("layers.0.feed_forward.gate.lora_a.weight", (16, 4096), False),
        ("layers.0.feed_forward.experts.w1.bias", (8, 14336), False),
    ],
)
def test_which_moments_are_in_8_bits(name, shape, eight):
    assert in_8_bits(name, shape) == eight


def test_the_planner_and_the_optimiser_choose_the_same_tensors():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: optim)")
    from helpers.training import make_decoder

    from accessory.train.optim import make_optimizer

    args = ROWS_OF_512.replace(vocab_size=64)
    for peft in (None, {"lora_rank": 16, "bias_tuning": True}):
        named = [(n, p) for n, p in make_decoder("sparse", args=args, peft=peft).named_parameters() if p.requires_grad]
        optimizer = make_optimizer(named, 0.0, kind="adamw_8bit")
        optimizer.allocate(0)
        held = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
        kind = "lora" if peft else "full"
        setup = finetuning(args.replace(**(peft or {})), kind=kind, **EIGHT)
        assert sum(moment_bytes(g, setup.task) for g in tensor_groups(setup) if is_trained(g, setup)) == held


def test_a_state_holds_what_the_moments_are():
    setup = full(**EIGHT)
    assert disk_bytes(setup)["states"] == 3 * (12 * SMALL + 6 * LARGE + 8 * LARGE // 256)
    assert disk_bytes(full(**BF16))["states"] == disk_bytes(full())["states"] == 3 * 12 * (SMALL + LARGE)


@pytest.mark.parametrize(
    ("choices", "fits"),
    [
        ({}, False),
        (BF16, False),
        (EIGHT, True),
        (HOST_MOMENTS, True),
        (EIGHT | BF16, True),
        (HOST_MOMENTS | BF16, True),
    ],
)
def test_what_lets_8_cards_of_80_gb_train_all_of_8x7b(choices, fits):
    """With 8 data-parallel ranks, rows of 4096 tokens and recomputation."""
    found = estimate(full(dp=8, data_parallel="fsdp", **choices))
    assert (found.total <= 80e9) == fits
    # 46.7 B / 8 = 5.84 B numbers a rank: a weight of 4 bytes, and the gradient and moments that are chosen.
    lasting = 4 + {"optimizer": 2 + 8 / 256, "offload": 0}.get(next(iter(choices), ""), 8)
    assert found.terms["weights"] + found.terms.get("optimiser", 0) == pytest.approx(lasting * 5.84e9, rel=0.01)


def test_ranks_sum_gradients_in_16_bits_where_products_are():
    """A rank's part of the gradients: 2 bytes a number, or 4 where products are in fp32 or micro-steps add up."""

    def gradients(dense_bytes=2, **choices):
        setup = replace(full(dp=8, data_parallel="fsdp", **choices), dense_bytes=dense_bytes)
        return step(setup)["gradients"]

    part = 46.7e9 / 8
    assert gradients() == pytest.approx(2 * part, rel=0.01)
    assert gradients(dense_bytes=4) == pytest.approx(4 * part, rel=0.01)
    assert gradients(accum_iter=2) == pytest.approx(4 * part, rel=0.01)
    assert gradients(dense_bytes=4, **BF16) == gradients(accum_iter=2, **BF16) == gradients()


def test_the_search_keeps_what_was_asked_for():
    card = Card("80 GB", 80 * 10**9, 8)
    assert smallest(full(), card) == []
    found = smallest(full(**EIGHT, **BF16), card)[0].setup
    assert (found.gpus, found.task.savings) == (8, EIGHT | BF16)
    found = smallest(full(**HOST_MOMENTS, **BF16), card)[0].setup
    assert (found.gpus, found.tp) == (4, 4)


def test_a_message_proposes_what_saves_enough():
    wide = TINY.replace(hidden_dim=2**14, n_layers=16)  # its largest moment is that with all gradients and moments
    setup = full(wide, max_words=2)
    need = estimate(setup).allocated
    assert "gradient_dtype bf16; or" in what_fits(setup, Room(int(0.95 * need), "a card"))
    assert "offload optimizer; or" in what_fits(setup, Room(int(0.65 * need), "a card"))
    # Moments that lie on the host already cannot be in 8 bits too.
    setup = full(wide, max_words=2, **HOST_MOMENTS)
    assert "adamw_8bit" not in what_fits(setup, Room(int(0.55 * need), "a card"))


@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_that_cut_whole_blocks_pass(tp):
    check_blocks(finetuning(CUTTABLE, kind="full", tp=tp, **EIGHT))
    check_blocks(finetuning(BIG, kind="full", tp=8, **EIGHT))


def test_ranks_that_cut_a_block_are_refused():
    check_blocks(finetuning(CUTTABLE, kind="full", tp=4))
    with pytest.raises(ConfigError, match="128 numbers of a row of tok_embeddings"):
        check_blocks(finetuning(CUTTABLE, kind="full", tp=4, **EIGHT))


def test_a_host_without_room_for_the_moments_is_refused():
    setup = full(dp=8, data_parallel="fsdp", **HOST_MOMENTS)
    check_host(setup, Room(50 * 10**9, HOST))
    check_host(setup, None)
    told = r"offload: the moments take 46\.7 GB of host memory on each rank, .* this machine has 40 GB for each; give"
    with pytest.raises(InputError, match=told):
        check_host(setup, Room(40 * 10**9, HOST))
