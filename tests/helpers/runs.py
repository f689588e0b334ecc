"""Whole finetuning runs of a tiny model: made, started as real processes, killed at chosen places, and read back."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.distributed import rank_context
from helpers.training import ARGS

RUN_ARGS = ARGS.replace(vocab_size=352, max_seq_len=128)
ITEMS = 24
_WORDS = "the cat sat on the mat hello world there what is the capital of France".split()


def dialogues(count: int = ITEMS, seed: int = 0) -> list[dict[str, Any]]:
    pick = random.Random(seed)

    def said() -> str:
        return " ".join(pick.choices(_WORDS, k=pick.randint(2, 9)))

    return [
        {"conversations": [{"from": "human", "value": said()}, {"from": "gpt", "value": said()}]} for _ in range(count)
    ]


def write_data(folder: Path, items: Sequence[Any], name: str = "data") -> Path:
    """Writes items to a .jsonl (strings as they are, others as JSON) and the YAML that names it; returns the YAML."""
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    meta = folder / f"{name}.yaml"
    meta.write_text(f"META:\n  - {{path: {name}.jsonl, type: text}}\n", encoding="utf-8")
    return meta


def write_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    from helpers.random_models import hf_mixtral
    from helpers.small_tokenizers import byte_level_folder

    hf_mixtral(RUN_ARGS.replace(**changes), seed).save_pretrained(folder)
    return byte_level_folder(folder)


def write_inputs(folder: Path) -> Path:
    """Writes `folder`/model, `folder`/data.yaml and `folder`/held.yaml."""
    write_model(folder / "model")
    write_data(folder, dialogues())
    write_data(folder, dialogues(6, seed=1), "held")
    return folder


def options(inputs: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Fields of a run of 2 × 6 steps in fp32 that saves a state every 3 steps."""
    return {
        "pretrained_path": [str(inputs / "model")],
        "data_config": str(inputs / "data.yaml"),
        "output_dir": str(output),
        "template": "chatml",
        "precision": "fp32",
        "batch_size": 2,
        "accum_iter": 2,
        "packing": False,
        "max_words": 128,
        "lr": 3e-3,
        "weight_decay": 0.1,
        "warmup_epochs": 0.3,
        "epochs": 2.0,
        "save_iteration_interval": 3,
        "device": "cpu",
        **changes,
    }


@contextmanager
def without_charts() -> Iterator[None]:
    """Inside the block, report.html is an empty file: to draw its charts takes longer than all else of a tiny run."""
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accessory.train.report.write.sections", lambda _: [])
        patch.setattr("accessory.train.report.write.page", lambda *_: "")
        yield


def finetune(inputs: Path, output: Path, **changes: Any) -> Path:
    """A run in this process; returns its finished folder."""
    from accessory.train.config import FinetuneConfig
    from accessory.train.run import finetune as run

    with without_charts():
        return run(FinetuneConfig(**options(inputs, output, **changes)))


@contextmanager
def ended_after(step: int) -> Iterator[None]:
    """Inside the block, a run gets SIGTERM in step `step`, saves its state and ends. The test fails if it goes on."""
    import pytest

    from accessory.errors import AccessoryError
    from accessory.train.loop import TrainingLoop

    original = TrainingLoop._train
    end_in_step(0, step)
    try:
        with pytest.raises(AccessoryError, match=f"^stopped by a signal after step {step}; its state is saved"):
            yield
    finally:
        TrainingLoop._train = original  # type: ignore[method-assign]


def interrupt(inputs: Path, output: Path, step: int, **changes: Any) -> None:
    """A run in this process that SIGTERM ends after step `step`."""
    with ended_after(step):
        finetune(inputs, output, **changes)


def records(output: Path, kind: str = "train") -> list[dict[str, Any]]:
    from accessory.train.metrics import read_metrics

    return [r for r in read_metrics(output) if r["kind"] == kind]


def curve(output: Path) -> list[tuple[int, float, float, float]]:
    """(step, cross-entropy, balance, gradient norm) of each record in the file."""
    return [(r["step"], r["loss"], r["balance"], r["grad_norm"]) for r in records(output)]


def same_curve(got: list[tuple[int, ...]], wanted: list[tuple[int, ...]], tolerance: float = 1e-6) -> None:
    assert [row[0] for row in got] == [row[0] for row in wanted], "each step once, in order"
    for a, b in zip(got, wanted, strict=True):
        for x, y in zip(a, b, strict=True):
            assert abs(x - y) <= tolerance * max(1.0, abs(y)), f"step {a[0]}: {a} instead of {b}"


def steps_written(output: Path) -> int:
    """The last step that metrics.jsonl has a record of; 0 if there is none."""
    path = output / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    found = [int(m[1]) for line in lines if (m := re.search(rb'"kind":"train","step":(\d+)', line))]
    return max(found, default=0)


def final_tensors(output: Path) -> dict[str, Any]:
    from accessory.checkpoint.folder import open_checkpoint

    return {n: t.load() for n, t in open_checkpoint(output / "final", allow_partial=True).tensors.items()}


def newest_state(output: Path) -> dict[str, Any]:
    from accessory.train.state import complete_states, state_tensors

    return {n: t.load() for n, t in state_tensors(complete_states(output / "states")[-1]).items()}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and modification time in ns of every file."""
    files = (p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else ()
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


def refused(inputs: Path, output: Path, *words: str, **changes: Any) -> None:
    """Checks that the run fails with a one-line message that contains `words`, and leaves its folder as it was."""
    import pytest

    from accessory.errors import AccessoryError

    before = snapshot(output)
    with pytest.raises(AccessoryError) as caught:
        finetune(inputs, output, **changes)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert snapshot(output) == before


# --------------------------------------------------------------------------- processes


@dataclass
class Started:
    """The processes of one run, one for each rank, and the files of their output."""

    processes: list[Any]
    logs: list[Path]

    def wait(self, timeout: float = 120) -> list[int]:
        """Returns the exit statuses (-9: killed). The test fails if a process has not ended after `timeout` seconds."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, p in enumerate(self.processes) if p.exitcode is None]
        self.kill()
        assert not hanging, f"ranks {hanging} hang: {[self.said(rank) for rank in hanging]}"
        return [p.exitcode for p in self.processes]

    def running(self) -> bool:
        return all(p.exitcode is None for p in self.processes)

    def kill(self, number: int = signal.SIGKILL) -> None:
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)
        if number == signal.SIGKILL:
            for process in self.processes:
                process.join()

    def said(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(encoding="utf-8") if self.logs[rank].exists() else ""

    def errors(self) -> list[str]:
        """The lines with "error" in the output of all ranks."""
        return [line for rank in range(len(self.logs)) for line in self.said(rank).splitlines() if "error" in line]


def start(
    fields: dict[str, Any],
    *,
    ranks: int = 1,
    prepare: Callable[..., None] | None = None,
    arguments: Any = (),
    logs: Path | None = None,
) -> Started:
    """Carry a run out as the command does, on `ranks` gloo ranks with torchrun's variables.

    Each process first calls `prepare(rank, *arguments)`, which arranges the fault that the process shall have.
    """
    context = rank_context()
    logs = logs or Path(fields["output_dir"] + ".logs")
    logs.mkdir(parents=True, exist_ok=True)
    environment = {}
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    files = [logs / f"{len(list(logs.iterdir()))}-rank{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank, file in enumerate(files):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        process = context.Process(target=_carry_out, args=(fields, own, str(file), rank, prepare, arguments))
        process.start()
        processes.append(process)
    return Started(processes, files)


def _carry_out(
    fields: dict[str, Any], environment: dict[str, str], log: str, rank: int, prepare: Any, arguments: Any
) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    os.environ.update(environment, OMP_NUM_THREADS="1")
    import torch

    from accessory.commands import outcome
    from accessory.commands.finetune import carry_out
    from accessory.train.config import FinetuneConfig

    outcome.FIRST_SPEAKS = 0  # no launcher ends these ranks when one of them is gone
    torch.set_num_threads(1)
    if prepare is not None:
        prepare(rank, *arguments)
    with without_charts():
        status = outcome.outcome(lambda: carry_out(FinetuneConfig(**fields)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # gloo sometimes aborts at interpreter exit


# --------------------------------------------------------------------------- kills


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

    def wrapped(self: Any, step: int, batches: Any) -> Any:
        if step == wanted:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, batches)

    TrainingLoop._train = wrapped  # type: ignore[method-assign]


def signal_after(rank: int, step: int, *numbers: int) -> None:
    """Arrange for the signals `numbers` to reach this process during step `step`."""
    from accessory.train.trainer import Trainer

    original, made = Trainer.step, [0]

    def wrapped(self: Any, *args: Any) -> Any:
        made[0] += 1
        if made[0] == step:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.05)  # Python runs signal handlers between instructions
        return original(self, *args)

    Trainer.step = wrapped  # type: ignore[method-assign]


def signal_rank(rank: int, wanted: int, step: int, *numbers: int) -> None:
    """Arrange the same for rank `wanted` alone."""
    if rank == wanted:
        signal_after(rank, step, *numbers)


def scale_fp16(rank: int, scale: float) -> None:
    """Arrange for fp16 to begin with loss scale `scale`, which overflows at first."""
    from accessory.train.optim import LossScale

    LossScale.for_dtype = classmethod(lambda cls, dtype: cls(scale))  # type: ignore[method-assign,assignment]


def check_folder(output: Path) -> None:
    """Checks that every state and checkpoint with a final name in a run's folder is whole."""
    from accessory.checkpoint.folder import open_checkpoint
    from accessory.train.state import complete_states, read_state_info, state_tensors

    for state in complete_states(output / "states"):
        info = read_state_info(state)
        assert state.name == f"step-{info.step:08d}"
        for tensor in state_tensors(state).values():
            assert tensor.load().shape == tensor.shape
    if (output / "final").exists():
        open_checkpoint(output / "final", allow_partial=True)


def left_over(output: Path) -> list[str]:
    """The names in a run's folder that a finished run should not leave."""
    known = {"config.yaml", "metrics.jsonl", "report.html", "states", "final"}
    odd = [p.name for p in output.iterdir() if p.name not in known]
    return odd + [p.name for p in (output / "states").iterdir() if not (p / "state.json").is_file() or "." in p.name]
