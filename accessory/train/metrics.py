"""`metrics.jsonl`, written and read: one JSON line a step and an evaluation. Loggers get copies.

A training record has `kind` "train" and `step`, counted from 1. Of the run so far it has `epoch`, `samples` (rows) and
`tokens` (without padding). Of the step it has `loss` (cross-entropy per learnt token), `balance`, `z`, `lr`,
`grad_norm`, `tokens_per_s`, `step_s`, `memory_gb` (the peak) and `layers`: L values each of `balance`, `entropy` (nats)
and `largest` (largest share), and L lists of E values of `share`. A held-out evaluation has `kind` "eval", `step`,
`loss`, `tokens`.

JSON has no NaN and no infinity, and strict readers refuse them: both are written as null and read back as NaN. Numbers
under `layers` are rounded to 7 decimals: fp32 knows no more, and the file is half as long. All others are exact.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from accessory.checkpoint.atomic import sync_folder
from accessory.errors import InputError
from accessory.train.loggers import open_logger, require_loggers, scalars

METRICS_FILE = "metrics.jsonl"
LAYER_DECIMALS = 7


class MetricsLog:
    """The one writer of a run's `metrics.jsonl`, on the first rank.

    A line reaches the operating system whole before `write` returns, so a run that is killed leaves at most one broken
    line, the last. resumed_at: the step that the run goes on from; records of later steps and a broken last line are
    removed, since those steps will be made again. None: the file starts empty. loggers: names of `train.loggers`, which
    get the scalars of each record, and `config` once.

    Raises ConfigError for an unknown logger and MissingExtraError for one whose package is missing, before anything is
    changed, and InputError where the file of a resumed run is no metrics file.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        loggers: Sequence[str] = (),
        resumed_at: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        require_loggers(loggers)
        self.path = Path(folder) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        values = plain(dict(config or {}))
        self._loggers = [open_logger(name, self.path.parent, values, resumed_at) for name in dict.fromkeys(loggers)]
        with write_whole(self.path) as file:
            if resumed_at is not None and self.path.exists():
                for line, record in _lines(self.path):
                    if record["step"] <= resumed_at:
                        file.write(line.rstrip(b"\n") + b"\n")
        self._file = self.path.open("ab")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record, whose values may be Python numbers, tensors or arrays."""
        values = plain({key: value for key, value in record.items() if key != "layers"})
        if "layers" in record:
            values["layers"] = plain(record["layers"], LAYER_DECIMALS)
        self._file.write(json.dumps(values, allow_nan=False, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        if self._loggers:
            named = scalars(record)
            for logger in self._loggers:
                logger.log(named, values["step"])

    def sync(self) -> None:
        """Make all records so far durable: they outlive a machine that fails."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Make the file durable and close the loggers. A second call does nothing."""
        if not self._file.closed:
            self.sync()
            self._file.close()
        while self._loggers:
            self._loggers.pop().close()


def iterate_metrics(folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The records of a run in their order, one at a time: a long run of a large model has hundreds of MB of them.

    A broken last line is left out: the run was killed, or is writing it just now. Raises InputError where there is no
    file, or where a line before the last is no record.
    """
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        raise InputError(f"{path}: missing; give the output folder of a finetuning run")
    for line, record in _lines(path):
        yield _with_nan(record) if b"null" in line else record


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a run; see `iterate_metrics`."""
    return list(iterate_metrics(folder))


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    broken = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if broken is not None:
                raise InputError(f"{path}:{broken}: not a record, though others follow; remove the line to go on")
            try:
                record = json.loads(line)
            except ValueError:  # UnicodeDecodeError is one, too
                record = None
            if isinstance(record, dict) and type(record.get("step")) is int and "kind" in record:
                yield line, record
            else:
                broken = number


def plain(value: Any, decimals: int | None = None) -> Any:
    """`value` as JSON holds it: tensors and arrays as lists, numbers that are not finite as None, others as text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if decimals is None else round(value, decimals)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, decimals) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, decimals) for item in value]
    return str(value)


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


@contextmanager
def write_whole(path: Path) -> Iterator[IO[bytes]]:
    """A new file that replaces `path` at the end of the block. It is removed where the block raises."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
