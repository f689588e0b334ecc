"""Loggers that show a run's scalars elsewhere: TensorBoard, Weights & Biases, Trackio.

Names are grouped: train/loss, eval/loss, router/balance, speed/tokens_per_s, router/layer_00/largest …. The share of
each expert stays in `metrics.jsonl` and in the report, since hundreds of curves help nobody. A new logger is a class
with the methods of `Logger` and an entry of `LOGGERS`.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from accessory.errors import ConfigError, MissingExtraError

PROJECT = "mixtral-accessory"  # where WANDB_PROJECT or TRACKIO_PROJECT does not say otherwise
GROUPS = {"balance": "router", "z": "router", "tokens_per_s": "speed", "step_s": "speed", "memory_gb": "speed"}
LAYER_SCALARS = ("balance", "entropy", "largest")


class Logger(Protocol):
    """What every logger does."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Show the scalars of a step."""

    def close(self) -> None:
        """Write what is still to be written."""


def require_loggers(names: Iterable[str]) -> None:
    """ConfigError for a name that is no logger, MissingExtraError for one whose package is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"loggers: got {name!r}, but it must be one of {', '.join(LOGGERS)}")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name in the current one has a spec without origin
            raise MissingExtraError(
                f"loggers: {name} needs the package {name}: pip install 'mixtral-accessory[log]' or pip install {name}"
            )


def open_logger(name: str, folder: Path, config: Mapping[str, Any], resumed_at: int | None) -> Logger:
    """Start a logger of the run in `folder`; `resumed_at` is the last step that stays, None for a new run."""
    require_loggers([name])
    return LOGGERS[name](folder, config, resumed_at)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers by grouped name. All layers' numbers have as many digits as the last one, at least two."""
    kind = record["kind"]
    named = {}
    for key, value in record.items():
        if key in ("kind", "step", "layers"):
            continue
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, int | float) and not isinstance(value, bool):
            group = kind if kind != "train" else GROUPS.get(key, "train")
            named[f"{group}/{key}"] = float(value)
    layers = record.get("layers", {})
    for key in LAYER_SCALARS:
        values = list(layers.get(key, ()))
        digits = max(2, len(str(len(values) - 1)))
        for layer, value in enumerate(values):
            named[f"router/layer_{layer:0{digits}d}/{key}"] = float(value)
    return named


class _TensorBoard:
    """Event files in `<folder>/tensorboard`. TensorBoard itself hides an earlier run's records of later steps."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=0 if resumed_at is None else resumed_at + 1
        )
        if resumed_at is None and config:
            rows = "".join(f"    {key}: {value}\n" for key, value in config.items())
            self._writer.add_text("config", rows)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run under `<folder>/wandb`, resumed under the same id; WANDB_MODE=offline keeps it on this machine.

    The service keeps every record that it got. Its curves run over our own step, so that a step which is made again
    after a resume lies over its first version.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], resumed_at: int | None) -> None:
        import wandb

        (folder / "wandb").mkdir(exist_ok=True)  # else it writes to a temporary folder
        kept = folder / "wandb" / "run-id.txt"
        if resumed_at is None or not kept.exists():
            kept.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                dir=str(folder),
                id=kept.read_text().strip(),
                resume=None if resumed_at is None else "allow",
                config=dict(config),
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"loggers: wandb did not start ({reason}); log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A local run (TRACKIO_DIR says where) for `trackio show`. A resume goes on with the last run of that name."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resumed_at: int | None) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=folder.resolve().name,
            config=dict(config),
            resume="never" if resumed_at is None else "allow",
            embed=False,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[Path, Mapping[str, Any], int | None], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
