"""How large the cache is, and what is said when memory runs out in a step."""

import pytest
import torch
from helpers.sizes import TINY

from accessory.engine.runner import Runner, fitting_pages
from accessory.engine.worst_step import worst_step_bytes, worst_steps
from accessory.errors import MemoryFullError
from accessory.launch.memory import HOST, Room
from accessory.limits import GRAPH_MOST_TOKENS, GRAPH_PROMPTS
from accessory.nn.decoder import Decoder, init_weights
from accessory.parallel.mesh import Ranks
from accessory.planner.fit import explained_on

PAGE = 2 * 2 * 64 * 2 * 8 * 4  # keys and values, layers, tokens, heads, head_dim, fp32


@pytest.fixture
def decoder():
    decoder = Decoder(TINY, "sparse")
    init_weights(decoder)
    return decoder.requires_grad_(False)


@pytest.mark.parametrize(
    ("room", "pages"),
    [
        (Room(40 * PAGE, HOST), 20),
        (Room(40 * PAGE, "a GPU"), 36),
        (Room(1000 * PAGE, HOST), 100),
        (Room(0, HOST), 2),
        (None, 100),
    ],
)
def test_the_cache_takes_a_part_of_what_is_free(decoder, room, pages, monkeypatch):
    monkeypatch.setattr("accessory.engine.runner.room_for", lambda device, group: room)
    assert fitting_pages(decoder, 100, None) == pages


def test_a_steps_tensors_have_room_beside_the_cache(decoder, monkeypatch):
    monkeypatch.setattr("accessory.engine.runner.room_for", lambda device, group: Room(40 * PAGE, HOST))
    assert fitting_pages(decoder, 100, None, beside=20 * PAGE) == 10
    assert fitting_pages(decoder, 100, None, beside=60 * PAGE) == 2


def test_a_cache_takes_all_that_is_free_where_that_is_asked_for(decoder, monkeypatch):
    monkeypatch.setattr("accessory.engine.runner.room_for", lambda device, group: Room(1000 * PAGE, "a GPU"))
    assert fitting_pages(decoder, 100, None, beside=200 * PAGE, more=True) == 720
    # A head of 8 numbers in fp8 takes 8 + 4 bytes instead of 4 · 8.
    assert fitting_pages(decoder, 100, None, beside=200 * PAGE, more=True, fp8=True) == 720 * 8 // 3
    monkeypatch.setattr("accessory.engine.runner.room_for", lambda device, group: None)
    assert fitting_pages(decoder, 100, None, more=True) == 100


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("max_seq_len", [2, 60, 10**6])
def test_the_worst_steps_are_as_large_as_steps_are_and_run(decoder, max_seq_len, fp8):
    runner = Runner(decoder, pages=9, max_seq_len=max_seq_len, vocab_size=64, fp8=fp8)
    plans = list(worst_steps(runner.about, max_seq_len))
    sequences, tokens = runner.about.max_running, runner.about.step_tokens
    assert [len(plan.entries) for plan in plans[:3]] == [sequences] * 3
    longest = max_seq_len - 1
    *_, graphed, judged = plans
    most = min(tokens, GRAPH_MOST_TOKENS, GRAPH_PROMPTS * longest)
    assert most - GRAPH_PROMPTS < sum(len(entry.ids) for entry in graphed.entries) <= most  # of equal prompts
    assert len(graphed.entries) <= GRAPH_PROMPTS
    assert sum(len(entry.ids) for entry in judged.entries) == min(tokens, sequences * longest)
    assert all(len(entry.targets) == len(entry.ids) <= longest for entry in judged.entries)
    for plan in plans:
        result = runner.run(plan).result()
        assert len(result.draws) == len(plan.entries)
        assert None not in result.draws
    assert len(result.scored) == len(judged.entries)


def test_what_the_worst_steps_take_is_the_peak_of_the_rank_with_the_largest(decoder, monkeypatch):
    made = []

    def make(pages):
        made.append(pages)
        return Runner(decoder, pages=pages, max_seq_len=10**6, vocab_size=64)

    for name, value in (("memory_allocated", 300), ("max_memory_reserved", 1000)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    assert worst_step_bytes(make, 200, None) == 700
    assert worst_step_bytes(make, 10**6, None) == 700
    assert made == [1 + 4, 1 + 64]

    def gather(taken, mine, group):
        assert mine == 700
        taken[:] = [mine, 900]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert worst_step_bytes(make, 200, Ranks(None, 0, 2)) == 900


def test_memory_that_runs_out_is_explained_in_every_step(decoder, monkeypatch):
    runner = Runner(
        decoder, pages=2, max_seq_len=64, vocab_size=64, explained=lambda: explained_on("cpu", "a step", "ask for less")
    )

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …")

    monkeypatch.setattr(Decoder, "forward", full)
    with pytest.raises(MemoryFullError, match=r"2\.50 GiB more were asked for; a step.*ask for less"):
        runner.score([[1, 2]], [None])


def test_a_page_table_is_no_longer_than_the_cache(decoder):
    Runner(decoder, pages=5, max_seq_len=10**12, vocab_size=64)
