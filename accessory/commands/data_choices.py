"""Combines the options of `accessory data check`, a finetune's configuration and defaults into `Choices`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accessory.checkpoint.hub import fetch_resources, is_remote
from accessory.commands.finetune import find_recipe
from accessory.config import LlamaType, ModelArgs
from accessory.data.records import is_data_file, listed_kinds, read_yaml
from accessory.errors import ConfigError, InputError
from accessory.train.config import FinetuneConfig
from accessory.vision_config import SPHINX


@dataclass(frozen=True)
class Choices:
    """The data to check, and how a run would train on it."""

    data: dict[str, str]  # "data_config" or "eval_data" -> path of a META list
    model: str  # a folder or a file on this machine
    template: str | None
    dialog: bool
    prompt_type: str | None
    max_words: int
    packing: bool
    seed: int
    batch_size: int
    accum_iter: int
    gpus: int
    replicas: int
    epochs: float
    max_steps: int | None
    checkpointing: bool
    output_dir: Path | None
    tokens_per_second: float | None
    image_tokens: int | None  # tokens of an image; 0: the run takes no images; None: unknown

    @property
    def rows(self) -> int:
        """Rows of a step, summed over all ranks."""
        return self.batch_size * self.accum_iter * self.replicas


def read_choices(options: argparse.Namespace) -> Choices:
    """Make the choices. Options win over a finetune's configuration, which wins over the defaults.

    Raises ConfigError for a wrong configuration or one that contradicts an option, InputError for an option that is
    out of range.
    """
    path = Path(options.config)
    path = path if path.exists() else find_recipe(options.config)
    recipe = None if is_data_file(path) or _is_list(path) else FinetuneConfig.from_yaml(path)
    if recipe is None:
        defaults: dict[str, Any] = {name: f.default for name, f in FinetuneConfig.__dataclass_fields__.items()}
    else:
        defaults = recipe.to_dict()
    given = {name: value for name, value in vars(options).items() if value is not None}

    def chosen(name: str) -> Any:
        return given.get(name, defaults[name])

    for name in ("max_words", "batch_size", "accum_iter", "gpus", "epochs", "tokens_per_second"):
        if not given.get(name, 1) > 0:
            raise InputError(f"--{name.replace('_', '-')}: got {given[name]}, but it must be more than 0")
    model = options.model or (recipe and (recipe.tokenizer_path or recipe.pretrained_path[0]))
    if not model:
        raise InputError("--model: missing; give a model's folder, or a tokenizer's file or folder")
    model = fetch_resources(model) if is_remote(model) else model
    gpus = options.gpus or (recipe.fewest_ranks if recipe else 1)
    data = {"data_config": recipe.data_config if recipe else str(path)}
    if recipe and recipe.eval_data:
        data["eval_data"] = recipe.eval_data
    return Choices(
        data=data,
        model=str(model),
        template=chosen("template"),
        dialog=chosen("dialog"),
        prompt_type=chosen("prompt_type"),
        max_words=chosen("max_words"),
        packing=chosen("packing"),
        seed=chosen("seed"),
        batch_size=chosen("batch_size"),
        accum_iter=chosen("accum_iter"),
        gpus=gpus,
        replicas=recipe.data_parallel_size(gpus) if recipe else gpus,
        epochs=chosen("epochs"),
        max_steps=chosen("max_steps"),
        checkpointing=chosen("checkpointing"),
        output_dir=Path(recipe.output_dir) if recipe else None,
        tokens_per_second=options.tokens_per_second,
        image_tokens=_image_tokens(recipe, Path(model)),
    )


def _is_list(path: Path) -> bool:
    """Whether a YAML lists data files. ConfigError where it is no recipe either."""
    values = read_yaml(path)
    if not isinstance(values, Mapping) or not {"META", "data_config"} & values.keys():
        raise ConfigError(
            f"{path}: neither a list of data (META) nor a finetune's configuration (data_config), nor a data file, "
            f"which ends in {listed_kinds()}"
        )
    return "META" in values


def _image_tokens(recipe: FinetuneConfig | None, model: Path) -> int | None:
    """Tokens of an image in the run; 0 where it takes no images, None where neither recipe nor model tells."""
    if recipe is not None and recipe.no_visual:
        return 0
    kind = recipe.llama_type if recipe is not None else None
    try:
        kind = kind or json.loads((model / "meta.json").read_text(encoding="utf-8"))["llama_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None if recipe is None else 0
    views = LlamaType.parse(kind).image_views
    if not views:
        return None if recipe is None else 0
    args = sizes_of(model, recipe.llama_config if recipe is not None else ())
    return ((args and args.vision) or SPHINX).image_tokens(views)


def sizes_of(model: Path, more: Sequence[str] = ()) -> ModelArgs | None:
    """The network's sizes from a model's folder; None where the folder has no configuration with sizes.

    more: configuration files that win over the folder's own.
    """
    for name in ("config.json", "params.json"):
        try:
            if "vocab_size" in json.loads((model / name).read_text(encoding="utf-8")):
                return ModelArgs.from_files(model / name, *more)
        except (OSError, ValueError, TypeError):
            continue
    return None
