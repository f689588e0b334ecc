"""Whole finetuning runs of a tiny model in this process: their inputs, the runs, and what they leave behind.

`started_runs` starts them as processes, and `run_faults` arranges what goes wrong in one.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.run_faults import end_in_step
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
