"""`ModelMemory`: asks the planner about a model that is to be loaded, and when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from accessory.launch.memory import Room, room_for
from accessory.planner.encoders import encoding_bytes
from accessory.planner.fit import check_cache, check_fit, explain, explained
from accessory.planner.peak import estimate
from accessory.planner.setup import Inference, Setup


@dataclass(frozen=True)
class ModelMemory:
    """A model as the planner sees it, its device, and the torch process group that shares it (None: one process)."""

    setup: Setup  # for one sequence; each question has its own batch and context
    device: torch.device
    group: Any = None

    def check_loading(self, max_seq_len: int, cache_gb: float | str | None = None) -> None:
        """InputError where the weights and a cache of one token, or of `cache_gb`, are more than a rank may take.

        Warns where one sequence of `max_seq_len` tokens probably needs more. Every rank must call it.
        """
        room = room_for(self.device, self.group)
        if cache_gb is not None and not isinstance(cache_gb, str):
            check_cache(self.setup, cache_gb, room)
        check_fit(self._setup(1, 1), room, likely=self._setup(1, max_seq_len))

    def step_bytes(self, max_seq_len: int) -> int:
        """What the largest step with a prompt of `max_seq_len` takes beside weights and cache."""
        return estimate(self._setup(1, max_seq_len)).passing

    def graph_bytes(self) -> int:
        """What the image encoders' CUDA graph takes, which no step without an image shows."""
        setup = self.setup
        return encoding_bytes(setup.args.sees_with, setup.images, setup.views, setup.tp) if setup.views else 0

    @contextmanager
    def explained(self, batch: int, tokens: int) -> Iterator[None]:
        """Say what was asked for and what would fit where memory runs out inside."""

        def describe() -> str:
            return explain(self._setup(batch, tokens), self._own_room())

        with explained(describe):
            yield

    def _own_room(self) -> Room | None:
        """What this process may take in all, its part of the CPU's memory counted. Other ranks may not be listening."""
        room = room_for(self.device, with_own=True)
        return room and room.shared_by(self.setup.tp)

    def _setup(self, batch: int, tokens: int) -> Setup:
        task = self.setup.task
        assert isinstance(task, Inference)
        return replace(self.setup, task=replace(task, batch=batch, context=max(2, tokens)))
