"""`accessory data check`: everything that can be known of finetuning data before a GPU is used."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from accessory.commands import data_view as view
from accessory.commands.finetune import find_recipe
from accessory.config import LlamaType, ModelArgs
from accessory.data.dataset import FinetuneData
from accessory.data.records import place, read_yaml
from accessory.data.template_base import Template
from accessory.data.templates import get_template
from accessory.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from accessory.errors import AccessoryError, ConfigError, InputError
from accessory.train.config import FinetuneConfig
from accessory.train.feed import Schedule
from accessory.train.metrics import METRICS_FILE, iterate_metrics
from accessory.vision_config import SPHINX

# What of the speed of large matrix products finetuning keeps, where nothing better is known.
EFFICIENCY = 0.35
_RECENT = 50  # records of an earlier run that tell its speed


@dataclass(frozen=True)
class Choices:
    """What is checked, and how it would be trained."""

    data: dict[str, str]  # title -> META list
    model: str
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
    image_tokens: int | None  # positions of an image; 0: the run looks at none; None: nobody says

    @property
    def rows(self) -> int:
        return self.batch_size * self.accum_iter * self.replicas


def check(options: argparse.Namespace) -> int:
    """Print the report; 1 when anything is wrong with the data, else 0. Raises AccessoryError for wrong options."""
    choices = _choices(options)
    tokenizer = load_tokenizer(_tokenizer_path(choices.model))
    args = _sizes(Path(choices.model))
    if args is not None:
        check_vocabulary(tokenizer, args.vocab_size)
    console = Console(highlight=False, soft_wrap=True)
    console.print(view.heading(choices, tokenizer))
    return max([_check_one(console, title, choices, tokenizer, args) for title in choices.data])


def _check_one(console: Console, title: str, choices: Choices, tokenizer: Tokenizer, args: ModelArgs | None) -> int:
    training = title == "data_config"
    problems: list[str] = []
    console.rule(f"{title}: {choices.data[title]}", align="left")
    try:
        data = FinetuneData.open(
            Path(choices.data[title]),
            tokenizer,
            max_words=choices.max_words,
            template=choices.template,
            dialog=choices.dialog,
            prompt_type=choices.prompt_type,
            seed=choices.seed,
            problems=problems,
            image_tokens=choices.image_tokens,
        )
    except InputError:
        if not problems:
            raise
        console.print(view.problems(problems))
        return 1
    template = get_template(choices.template or "default", tokenizer)
    begun, found = check_bos(data, tokenizer, template)
    problems += found
    console.print(view.counts(data))
    console.print(view.histogram(data))
    if training:
        schedule = Schedule(
            data,
            rows=choices.rows,
            max_words=choices.max_words,
            packing=choices.packing,
            seed=choices.seed,
            epochs=choices.epochs,
            max_steps=choices.max_steps,
        )
        console.print(view.steps(choices, schedule))
        console.print("time      " + _time(choices, schedule, data, args))
    if any(file.encoded.images for file in data.files):
        console.print(view.images(data, choices.image_tokens))
    console.print(begun)
    for group in range(len(data.group_names)):
        console.print(view.preview(data, group, tokenizer, marked=console.color_system is None))
    console.print(view.problems(problems))
    return 1 if problems else 0


# --------------------------------------------------------------------------- what was asked for


def _choices(options: argparse.Namespace) -> Choices:
    """Options win over a finetune's configuration, that over the defaults; ConfigError where they contradict."""
    path = Path(options.config)
    path = path if path.exists() else find_recipe(options.config)
    values = read_yaml(path)
    if not isinstance(values, Mapping) or not {"META", "data_config"} & values.keys():
        raise ConfigError(f"{path}: neither a list of data (META) nor a finetune's configuration (data_config)")
    recipe = None if "META" in values else FinetuneConfig.from_yaml(path)
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
    parallel = recipe.model_parallel_size if recipe else 1
    gpus = options.gpus or parallel
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
        image_tokens=_image_words(recipe, Path(model)),
    )


def _tokenizer_path(model: str) -> Path:
    if "://" in model:
        raise InputError(f"--model: {model} is not on this machine; give a folder, or a tokenizer's file or folder")
    return Path(model)


def _image_words(recipe: FinetuneConfig | None, model: Path) -> int | None:
    """Positions that an image takes in the run; 0 where it looks at none, None where neither recipe nor model tells."""
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
    args = _sizes(model, recipe.llama_config if recipe is not None else ())
    return ((args and args.vision) or SPHINX).image_tokens(views)


def _sizes(model: Path, more: Sequence[str] = ()) -> ModelArgs | None:
    """The network's sizes, where a configuration is there that tells them; `more` files win over it."""
    for name in ("config.json", "params.json"):
        try:
            if "vocab_size" in json.loads((model / name).read_text(encoding="utf-8")):
                return ModelArgs.from_files(model / name, *more)
        except (OSError, ValueError, TypeError):
            continue
    return None


# --------------------------------------------------------------------------- what is found


def check_bos(data: FinetuneData, tokenizer: Tokenizer, template: Template) -> tuple[str, list[str]]:
    """What is true of BOS, in a line, and the items of which it is not."""
    bos = tokenizer.bos_id
    if bos is None or not (tokenizer.add_bos or getattr(template, "always_bos", False)):
        return "BOS       the tokenizer puts none before a text", []
    problems = []
    for file in data.files:
        e = file.encoded
        if not len(e.lines):
            continue
        numbers = np.add.reduceat(e.ids == bos, e.start[:-1], dtype=np.int64)
        begins = e.ids[e.start[:-1]] == bos
        for item in np.flatnonzero((numbers != 1) | ~begins).tolist():
            where = place(file.source.path, int(e.lines[item]))
            what = f"{numbers[item]} times" if numbers[item] != 1 else "once, but not at the beginning"
            problems.append(
                f"{where}: BOS ({tokenizer.bos_token}, id {bos}) is there {what}; it must begin the item, once"
            )
    if problems:
        return f"BOS       wrong in {len(problems):,} items", problems
    items = sum(len(f.encoded.lines) for f in data.files)
    return f"BOS       {tokenizer.bos_token} (id {bos}) begins each of the {items:,} items, and is nowhere else", []


def _time(choices: Choices, schedule: Schedule, data: FinetuneData, args: ModelArgs | None) -> str:
    """How long it will take, and how that is known; or what to do to know it."""
    speed, source = choices.tokens_per_second, "as given"
    if speed is None and choices.output_dir is not None:
        speed, source = _speed_of_run(choices.output_dir), f"the speed of the run in {choices.output_dir}"
    if speed is None and args is not None and torch.cuda.is_available():
        speed, source = _speed_of_gpu(choices, args)
    if speed is None:
        return (
            "unknown here; give --tokens-per-second (of all GPUs together), or make a few steps of the run: its "
            f"{METRICS_FILE} tells"
        )
    tokens = sum(int(data.lengths[i]) for step in range(schedule.steps) for row in schedule.rows(step) for i in row)
    return f"about {view.duration(tokens / speed)} for {tokens:,} tokens at {speed:,.0f} a second ({source})"


def _speed_of_run(folder: Path) -> float | None:
    try:
        speeds = [r["tokens_per_s"] for r in iterate_metrics(folder) if r["kind"] == "train"][-_RECENT:]
    except (OSError, AccessoryError, KeyError):
        return None
    return float(statistics.median(speeds)) if speeds and statistics.median(speeds) > 0 else None


def _speed_of_gpu(choices: Choices, args: ModelArgs) -> tuple[float, str]:
    """From how fast this machine's GPU multiplies matrices, and what a token needs of that."""
    rate = _matrix_rate("cuda", 8192)
    # Forward 2, backward 4, forward again 2 where activations are computed anew, for each parameter a token uses.
    per_token = (8 if choices.checkpointing else 6) * args.parameter_counts()[1]
    speed = EFFICIENCY * rate * choices.gpus / per_token
    return speed, (
        f"supposing that {choices.gpus} GPUs like this one, which multiplies at {rate / 1e12:.0f} TFLOP/s, keep "
        f"{EFFICIENCY:.0%} of that in a full finetune"
    )


def _matrix_rate(device: str, size: int) -> float:
    """Floating-point operations a second of bf16 matrix products."""
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)

    def run(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    run(3)
    return 10 * 2 * size**3 / run(10)
