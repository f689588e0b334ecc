"""What becomes of a run's records: `metrics.jsonl`, the progress line, and warnings about the router."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accessory.train.config import FinetuneConfig
from accessory.train.metrics import MetricsLog
from accessory.train.progress import Progress, RouterWatch
from accessory.train.resume import Start


@dataclass(frozen=True)
class Recorder:
    """The first rank's recorder. It writes each record down, shows it, and warns of a router that goes wrong."""

    metrics: MetricsLog
    progress: Progress
    watch: RouterWatch

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record of a step or of an evaluation, with the keys that `train.metrics` names."""
        self.metrics.write(record)
        self.progress.update(record)
        if record["kind"] == "train":
            for warning in self.watch.check(record):
                self.progress.note(warning)

    def sync(self) -> None:
        """Make all records so far durable."""
        self.metrics.sync()


class NullRecorder:
    """The recorder of every other rank. It drops all records."""

    def write(self, record: Mapping[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass


@contextmanager
def open_recorder(
    first: bool, folder: Path, config: FinetuneConfig, start: Start, *, steps: int, top_k: int
) -> Iterator[Recorder | NullRecorder]:
    """This rank's recorder, closed at the end of the block. `steps`: of the whole run; `top_k`: experts of a token."""
    if not first:
        yield NullRecorder()
        return
    with (
        MetricsLog(folder, config.loggers, resumed_at=start.resumed_at, config=config.to_dict()) as metrics,
        Progress(steps, done=start.step) as progress,
    ):
        yield Recorder(metrics, progress, RouterWatch(top_k))
