"""A recipe as a commented YAML file: every field, its one-line help, and its default where nothing else was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

import yaml

from accessory.train.config import FinetuneConfig

# The field that begins each group, and what the group is.
GROUPS = {
    "pretrained_path": "The model",
    "data_config": "The data",
    "batch_size": "The steps",
    "load_balancing_weight": "The loss",
    "lora_rank": "What is trained; null: what the model says",
    "model_parallel_size": "The ranks",
    "output_dir": "What is written",
}
_WIDTH = 40  # of a key with its value; the help stands behind


def recipe_text(values: Mapping[str, Any], about: Iterable[str] = ()) -> str:
    """The text of a recipe. values: the fields that are chosen. about: lines of comment that it begins with.

    A field that is not chosen is a comment that shows its default, ready to be changed.
    """
    lines = [f"# {line}".rstrip() for line in about]
    for field in fields(FinetuneConfig):
        if field.name in GROUPS:
            lines += ["", f"# {GROUPS[field.name]}"]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        chosen = field.name in values
        shown = f"{'' if chosen else '# '}{field.name}: {_inline(values.get(field.name, default))}"
        lines.append(f"{shown:<{_WIDTH}}  # {field.metadata['help']}")
    return "\n".join(lines).lstrip("\n") + "\n"


def _inline(value: Any) -> str:
    """A value in YAML, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
