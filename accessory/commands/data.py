"""`accessory data check`: checks finetuning data, and shows how a run would use it, without a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from accessory.commands import data_view as view
from accessory.commands.data_choices import Choices, read_choices, sizes_of
from accessory.commands.training_speed import expected_speed
from accessory.config import ModelArgs
from accessory.data.bos_check import check_bos
from accessory.data.dataset import FinetuneData
from accessory.data.templates import get_template
from accessory.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from accessory.errors import InputError
from accessory.train.dataloader import Schedule


def check(options: argparse.Namespace) -> int:
    """Print the report. Returns 1 where the data has a problem, else 0. Raises AccessoryError for wrong options."""
    choices = read_choices(options)
    tokenizer = load_tokenizer(choices.model)
    args = sizes_of(Path(choices.model))
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
    misplaced = check_bos(data, tokenizer, get_template(choices.template or "default", tokenizer))
    problems += misplaced or []
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
        speed = expected_speed(
            choices.tokens_per_second,
            choices.output_dir,
            args,
            gpus=choices.gpus,
            checkpointing=choices.checkpointing,
        )
        console.print(view.time(data, schedule, speed))
    if any(file.encoded.images for file in data.files):
        console.print(view.images(data, choices.image_tokens))
    console.print(view.bos(data, tokenizer, misplaced))
    for group in range(len(data.group_names)):
        console.print(view.preview(data, group, tokenizer, marked=console.color_system is None))
    console.print(view.problems(problems))
    return 1 if problems else 0
