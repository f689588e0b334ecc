"""What goes wrong in a finetuning run: it is killed at a chosen place, gets a signal in a chosen step, or overflows.

Each function arranges its fault in the process that calls it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


SPOTS = (
    "boxes",  # a state's tensors are written under a temporary name, its description is not
    "description",  # half of the description is written
    "unmarked",  # the description is written; the folder is about to get its final name
    "named",  # the folder has its final name; older states are about to be removed
    "dropping",  # a state is half removed
    "final",  # the finished checkpoint is written under a temporary name
    "final unmarked",  # the finished checkpoint is about to get its final name
    "report",  # the finished checkpoint has its final name
)


def die_at(rank: int, spot: str, time_of: int = 1) -> None:
    """Arrange for this process to be killed when it reaches `spot` for the `time_of`-th time."""
    from accessory.checkpoint import atomic, save
    from accessory.train import run_folder, state

    left = [time_of]

    def now() -> bool:
        left[0] -= 1
        return left[0] == 0

    def after(
        module: Any, name: str, condition: Callable[..., bool] = lambda *_, **__: True, before: bool = False
    ) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            strike = condition(*args, **kwargs) and now()
            if strike and before:
                die()
            result = original(*args, **kwargs)
            if strike:
                die()
            return result

        setattr(module, name, wrapped)

    def half_removed(path: Any, *args: Any, **kwargs: Any) -> None:
        if now():
            next(Path(path).glob("*.safetensors")).unlink()
            die()
        remove(path, *args, **kwargs)

    def half_written(value: Any, handle: Any, **kwargs: Any) -> None:
        text = json.dumps(value, **kwargs)
        if now():
            handle.write(text[: len(text) // 2])
            handle.flush()
            die()
        handle.write(text)

    def of(ending: str) -> Callable[..., bool]:
        return lambda path, *_: Path(path).name.startswith(ending) and Path(path).name.endswith(".partial")

    if spot == "boxes":
        after(state.dcp, "save")
    elif spot == "description":
        state.json = type("json", (), {"dump": staticmethod(half_written), "loads": json.loads})
    elif spot == "unmarked":
        after(atomic, "sync_folder", of("step-"))
    elif spot == "named":
        after(atomic, "sync_folder", lambda path, *_: Path(path).name == "states")
    elif spot == "dropping":
        remove = state.shutil.rmtree
        state.shutil = type("shutil", (), {"rmtree": staticmethod(half_removed)})
    elif spot == "final":
        after(save, "_check_written", before=True)
    elif spot == "final unmarked":
        after(atomic, "sync_folder", of("final"))
    elif spot == "report":
        after(run_folder, "write_report", before=True)
    else:
        raise ValueError(spot)


def end_in_step(rank: int, wanted: int) -> None:
    """Arrange for SIGTERM to reach this process in step `wanted` of the whole run, after which the run ends."""
    from accessory.train.loop import TrainingLoop

    original = TrainingLoop._train

    def wrapped(self: Any, step: int, *others: Any) -> Any:
        if step == wanted:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, *others)

    TrainingLoop._train = wrapped  # type: ignore[method-assign]


def signal_after(rank: int, step: int, *numbers: int) -> None:
    """Arrange for the signals `numbers` to reach this process during step `step`."""
    from accessory.train.trainer import Trainer

    original, made = Trainer.step, [0]

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        if made[0] == step:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.05)  # Python runs signal handlers between instructions
        return original(self, *args, **kwargs)

    Trainer.step = wrapped  # type: ignore[method-assign]


def signal_rank(rank: int, wanted: int, step: int, *numbers: int) -> None:
    """Arrange the same for rank `wanted` alone."""
    if rank == wanted:
        signal_after(rank, step, *numbers)


def scale_fp16(rank: int, scale: float) -> None:
    """Arrange for fp16 to begin with loss scale `scale`, which overflows at first."""
    from accessory.train.optim import LossScale

    LossScale.for_dtype = classmethod(lambda cls, dtype: cls(scale))  # type: ignore[method-assign,assignment]
