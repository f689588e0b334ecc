"""On a GPU: recording CUDA graphs."""

import gc

import pytest
import torch

from accessory.ops.graphs import Graphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_graphs_that_nobody_holds_do_not_disturb_a_recording():
    """They are freed by the garbage collector, which may begin at any line of what is recorded."""
    device, x = torch.device("cuda", 0), torch.arange(4.0)
    unheld = Graphs(device)
    unheld.run("key", lambda x: x + 1, x)
    unheld.itself = unheld
    del unheld

    def function(x):
        for _ in range(100):  # of these, one more than are kept starts a collection
            x = sum([x, *[[[] for _ in range(10)] and 1.0]])
        return x

    threshold = gc.get_threshold()
    gc.collect(0)
    gc.set_threshold(5, 1, 1)
    try:
        torch.testing.assert_close(Graphs(device).run("key", function, x).cpu(), x + 100)
    finally:
        gc.set_threshold(*threshold)
    assert gc.isenabled()
