"""`write_report`: from a run's folder to its `report.html`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from accessory.errors import InputError, MissingExtraError
from accessory.train.metrics import write_whole
from accessory.train.report.history import read_history
from accessory.train.report.page import page
from accessory.train.report.sections import sections
from accessory.train.report.summary import subtitle, tiles

REPORT_FILE, CONFIG_FILE = "report.html", "config.yaml"


def write_report(
    folder: str | os.PathLike[str], title: str | None = None, config: Mapping[str, Any] | None = None
) -> Path:
    """Make `report.html` of the run in `folder`, finished, running or dead; returns its path.

    `title` defaults to the folder's name, `config` to its `config.yaml`. The file is replaced as a whole.
    Raises MissingExtraError without Bokeh, before anything is read; InputError where there are no metrics, or no
    training step among them.
    """
    folder = Path(folder)
    _require_bokeh(folder)
    history = read_history(folder)
    config = _config_of(folder) if config is None else config
    title = title or f"Finetuning {folder.resolve().name}"
    text = page(title, subtitle(history), tiles(history), sections(history), config)
    with write_whole(folder / REPORT_FILE) as file:
        file.write(text.encode())
    return folder / REPORT_FILE


def _require_bokeh(folder: Path) -> None:
    spec = importlib.util.find_spec("bokeh")
    if spec is None or spec.origin is None:  # of a mere folder of that name in the current one, Python makes a spec
        raise MissingExtraError(
            f"{folder / REPORT_FILE}: its charts need Bokeh: pip install 'mixtral-accessory[report]', "
            f"then accessory report {folder}"
        )


def _config_of(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not YAML ({str(error).splitlines()[0]}); mend or remove it") from error
    return config if isinstance(config, Mapping) else {}
