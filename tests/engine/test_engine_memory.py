"""How large the cache is, and what is said when memory runs out in a step."""

import pytest
import torch
from helpers.sizes import TINY

from accessory.engine.runner import Runner, fitting_pages
from accessory.errors import MemoryFullError
from accessory.launch.memory import HOST, Room
from accessory.nn.decoder import Decoder, init_weights
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
