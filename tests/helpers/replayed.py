"""A stand-in for CUDA graphs on a CPU: a replay computes into the tensors of the recording."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.utils._pytree import tree_leaves

from accessory.ops.graphs import Graphs


def replay_on_cpu(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Let `Graphs` record on a CPU, for the modules that ask `possible`."""

    def recorded(self: Graphs[Any], function: Callable[[Tensor], Any], x: Tensor) -> tuple[Any, Tensor, Any]:
        input_ = x.clone()
        function(input_)  # the warm-up
        out = function(input_)

        def replay() -> None:
            for kept, new in zip(tree_leaves(out), tree_leaves(function(input_)), strict=True):
                if new is not None:
                    kept.copy_(new)

        return replay, input_, out

    monkeypatch.setattr(Graphs, "_record", recorded)
    for module in modules:
        monkeypatch.setattr(f"{module}.possible", lambda device: True)
