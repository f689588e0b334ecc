"""Which graph replays a step, and that its padding changes no answer; on a CPU with a stand-in."""

import random

import numpy as np
import pytest
import torch
from helpers.replayed import replay_on_cpu
from helpers.traffic import (
    PAGES,
    alone,
    answers,
    check_against,
    random_wishes,
    rich_decoder,
    rich_runner,
    tiny_engine,
    with_adapters_and_images,
)
from hypothesis import given
from hypothesis import strategies as st

from accessory.engine.graphs import StepGraphs
from accessory.engine.runner import Runner
from accessory.engine.step_input import Size, StepInput, padded
from accessory.limits import GRAPH_MOST_TOKENS, GRAPH_PROMPTS, PAGE_SIZE

CPU = torch.device("cpu")


def random_step(r: random.Random, decodes: int, counts: list[int], pages: int) -> tuple[StepInput, Size]:
    """Tokens of `decodes` sequences with one each, then of prompts; all numbers but queries are drawn."""
    numbers = np.random.default_rng(r.randrange(2**32))
    T, B = decodes + sum(counts), decodes + len(counts)
    size = Size(decodes, sum(counts), len(counts), B, pages)
    drawn = [numbers.integers(1, 1000, shape) for shape in size.shapes()]
    step = StepInput(*drawn)._replace(query_C=np.concatenate([[0], np.cumsum([1] * decodes + counts)]))
    assert step.query_C[-1] == T
    return step, size


@given(st.data())
def test_padding_moves_what_is_there_and_writes_to_page_0(data):
    r = random.Random(data.draw(st.integers(0, 2**32)))
    decodes = data.draw(st.integers(0, 9))
    counts = data.draw(st.lists(st.integers(2, 90), min_size=0 if decodes else 1, max_size=5))
    step, here = random_step(r, decodes, counts, data.draw(st.integers(1, 6)))
    assert all((a == b).all() for a, b in zip(StepInput.views(step.flat(here), here), step, strict=True))

    vector = here.zeros()
    assert all((view.ctypes.data - vector.ctypes.data) % 16 == 0 for view in StepInput.views(vector, here))

    more, pages = data.draw(st.integers(0, 4)), here.pages + data.draw(st.integers(0, 3))
    tokens = here.tokens + data.draw(st.integers(0, 150)) if counts else 0
    prompts = len(counts) + 1 + data.draw(st.integers(0, 3)) if counts else 0
    size = Size(decodes + more, tokens, prompts, decodes + more + prompts if counts else 0, pages)
    out = StepInput.views(padded(step, here, size), size)

    token_at = [*range(decodes), *range(size.decodes, size.decodes + here.tokens)]
    for now, new in zip(step[:5], out[:5], strict=True):
        assert (new[token_at] == now).all()
    sequence_at = [*range(decodes), *range(size.decodes, size.decodes + len(counts))]
    assert (out.length_B[sequence_at] == step.length_B).all()
    assert (out.page_BP[sequence_at, : here.pages] == step.page_BP).all()
    assert (np.diff(out.query_C)[sequence_at] == [1] * decodes + counts).all()
    if counts:
        assert (out.row_R[sequence_at] == out.query_C[1:][sequence_at] - 1).all()
    # What is left: no sequence's pages, no adapter, keys that padding itself wrote.
    rest = np.setdiff1d(np.arange(size.all_tokens), token_at)
    assert (out.write_T[rest] < PAGE_SIZE).all()
    assert (out.adapter_T[rest] == -1).all()
    others = np.setdiff1d(np.arange(size.sequences), sequence_at)
    assert not out.page_BP[others].any()
    for b in others:
        queries = out.query_C[b + 1] - out.query_C[b]
        assert out.length_B[b] == max(queries, 1)
        written = set(out.write_T[out.query_C[b] : out.query_C[b + 1]])
        assert written == set(range(min(queries, PAGE_SIZE)))
    assert out.query_C[-1] == size.all_tokens
    assert (np.diff(out.query_C) >= 0).all()


def graphs(monkeypatch, most=12, host_free=lambda tokens, adapted: True):
    replay_on_cpu(monkeypatch, "accessory.engine.graphs")
    return StepGraphs(lambda flat, size, adapted: flat[: size.decodes, None], host_free, 5, CPU, most)


def test_the_graph_is_the_smallest_that_holds_the_step(monkeypatch):
    made = graphs(monkeypatch)
    for decodes, rows in ((1, 1), (3, 4), (5, 8), (9, 12)):
        assert made.size(Size(decodes, 0, 0, decodes, 2), False) == Size(rows, 0, 0, 0, 5)
    assert made.size(Size(13, 0, 0, 13, 2), False) is None
    all_prompts = GRAPH_PROMPTS + 1
    assert made.size(Size(0, 33, 2, 2, 1), False) == Size(0, 64, all_prompts, all_prompts, 5)
    assert made.size(Size(1, 64, 2, 3, 1), False) == Size(12, 64, all_prompts, 12 + all_prompts, 5)
    assert made.size(Size(0, GRAPH_MOST_TOKENS, 1, 1, 5), True).tokens == GRAPH_MOST_TOKENS
    assert made.size(Size(0, GRAPH_MOST_TOKENS + 1, 1, 1, 5), True) is None
    assert made.size(Size(1, GRAPH_MOST_TOKENS, 1, 1, 5), True) is None
    assert made.size(Size(0, 100, GRAPH_PROMPTS, 1, 5), False) is not None
    assert made.size(Size(0, 100, GRAPH_PROMPTS + 1, 1, 5), False) is None


def test_a_step_that_needs_the_host_has_no_graph(monkeypatch):
    asked = []
    made = graphs(monkeypatch, host_free=lambda tokens, adapted: bool(asked.append((tokens, adapted))) or tokens < 8)
    assert [made.size(Size(n, 0, 0, n, 1), False) is None for n in (4, 5, 4)] == [False, True, False]
    assert made.size(Size(0, 2, 1, 1, 1), True) is None
    assert asked == [(4, False), (8, False), (32, True)]


def test_steps_with_adapters_have_graphs_of_their_own(monkeypatch):
    made = graphs(monkeypatch)
    step, here = random_step(random.Random(0), 3, [], 1)
    size = made.size(here, False)
    assert made.again(size, False) is None
    assert made.step(size, step, here, False).flatten().tolist() == [*step.token_T, 0]
    assert made.again(size, False) is not None
    assert made.again(size, True) is None


def test_no_card_no_graphs():
    made = StepGraphs(lambda flat, size, adapted: flat, lambda tokens, adapted: True, 5, CPU, 12)
    assert made.size(Size(1, 0, 0, 1, 1), False) is None


@pytest.mark.parametrize("kind", ["int8", pytest.param("base", marks=pytest.mark.slow)])
def test_answers_are_those_without_graphs(kind, monkeypatch):
    """Prompts in chunks, beside others that decode, with adapters: what a request gets alone, without a graph."""
    decoder, r = rich_decoder(kind), random.Random(5)
    wishes = with_adapters_and_images(r, random_wishes(r, 24))
    singles = alone(rich_runner(decoder), wishes)
    replay_on_cpu(monkeypatch, "accessory.engine.graphs")
    monkeypatch.setattr(Runner, "_host_free", lambda self, tokens, adapted: True)
    runner = rich_runner(decoder)
    replayed = []
    step = runner._graphs.step
    monkeypatch.setattr(runner._graphs, "step", lambda size, *rest: replayed.append(size) or step(size, *rest))
    for budget, slots, ahead in ((512, 32, 1), (40, 6, 0)):
        engine = tiny_engine(runner, pages=PAGES, budget=budget, slots=slots, ahead=ahead)
        for request, single in zip(answers(engine, wishes), singles, strict=True):
            check_against(request, single)
    assert {bool(size.tokens) for size in replayed} == {True, False}
    assert {bool(size.decodes) for size in replayed if size.tokens} == {True, False}
