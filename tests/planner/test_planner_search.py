"""The search for the smallest setups: which ones it finds, that they fit, and which cards it knows."""

import pytest
from helpers.plans import BIG, finetuning, running
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.errors import ConfigError
from accessory.formats import Quant
from accessory.planner.cards import Card, card_of
from accessory.planner.peak import estimate
from accessory.planner.search import RESERVE, TRIED_FORMATS, smallest, smallest_of_each
from accessory.planner.setup import Inference, Setup


def told(found):
    return [(f.setup.gpus, f.setup.quant.experts or "bf16") for f in found]


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
    quant=st.sampled_from(TRIED_FORMATS),
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
    mixed = Setup(args=BIG, task=Inference(), quant=Quant("int4", "int8", "int8"))
    first = smallest_of_each(mixed, [card_of("H100")])[0]
    assert first.setup.quant == mixed.quant


def test_an_unknown_card_is_named_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"card: got 'H1000', but known are .*H100.*--memory"):
        card_of("H1000")
