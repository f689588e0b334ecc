"""Which graph replays a step, on a CPU with a stand-in."""

import numpy as np
import torch
from helpers.replayed import replay_on_cpu

from accessory.engine.graphs import DecodeGraphs


def test_a_step_is_filled_up_to_its_bucket_and_steps_with_adapters_have_their_own(monkeypatch):
    replay_on_cpu(monkeypatch, "accessory.engine.graphs")
    calls = []

    def forward(numbers_BC, adapted):
        calls.append((len(numbers_BC), adapted))
        return numbers_BC.sum(1, keepdim=True) * (-1 if adapted else 1)

    padding_C = np.array([7, 0], dtype=np.int32)
    graphs = DecodeGraphs(forward, lambda rows, adapted: rows < 8, padding_C, torch.device("cpu"), 12)
    assert graphs.buckets == [1, 2, 4, 8, 12]
    assert [graphs.bucket(n, False) for n in (1, 3, 4, 5, 13)] == [1, 4, 4, None, None]
    assert graphs.again(4, False) is None
    for first in (1, 10):
        numbers_BC = np.array([[first, 1], [2, 2], [3, 3]], dtype=np.int32)
        assert graphs.step(4, numbers_BC, False).tolist() == [[first + 1], [4], [6], [7]]
        assert graphs.step(4, numbers_BC, True).tolist() == [[-first - 1], [-4], [-6], [-7]]
    assert set(calls) == {(4, False), (4, True)}
    assert graphs.again(4, True) is not None


def test_no_card_no_graphs():
    graphs = DecodeGraphs(lambda x, a: x, lambda n, a: True, np.zeros(1, np.int32), torch.device("cpu"), 12)
    assert graphs.bucket(1, False) is None
