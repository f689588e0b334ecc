"""`accessory data check`: checks finetuning data, and shows how a run would use it, without a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from accessory.commands import data_view as view
from accessory.commands.data_choices import Choices, read_choices, sizes_of
from accessory.commands.data_result import Checked, as_json, images
from accessory.commands.json_output import print_json
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
    if options.json:
        checked = {title: _check_one(title, choices, tokenizer, args) for title in choices.data}
        print_json(as_json(choices, tokenizer, checked))
        return int(any(one.problems for one in checked.values()))
    console = Console(highlight=False, soft_wrap=True)
    console.print(view.heading(choices, tokenizer))
    wrong = False
    for title in choices.data:
        console.rule(f"{title}: {choices.data[title]}", align="left")
        one = _check_one(title, choices, tokenizer, args)
        _show(console, one, choices, tokenizer)
        wrong = wrong or bool(one.problems)
    return int(wrong)


def _check_one(title: str, choices: Choices, tokenizer: Tokenizer, args: ModelArgs | None) -> Checked:
    path, problems = choices.data[title], list[str]()
    try:
        data = FinetuneData.open(
            Path(path),
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
        return Checked(path, problems)
    misplaced = check_bos(data, tokenizer, get_template(choices.template or "default", tokenizer))
    problems += misplaced or []
    if title != "data_config":
        return Checked(path, problems, data, misplaced)
    schedule = Schedule(
        data,
        rows=choices.rows,
        max_words=choices.max_words,
        packing=choices.packing,
        seed=choices.seed,
        epochs=choices.epochs,
        max_steps=choices.max_steps,
    )
    speed = expected_speed(
        choices.tokens_per_second, choices.output_dir, args, gpus=choices.gpus, checkpointing=choices.checkpointing
    )
    return Checked(path, problems, data, misplaced, schedule, speed)


def _show(console: Console, one: Checked, choices: Choices, tokenizer: Tokenizer) -> None:
    data = one.data
    if data is not None:
        console.print(view.counts(data))
        console.print(view.histogram(data))
        if one.schedule is not None:
            console.print(view.steps(choices, one.schedule))
            console.print(view.time(data, one.schedule, one.speed))
        if (seen := images(data)) is not None:
            console.print(view.images(seen, data, choices.image_tokens))
        console.print(view.bos(data, tokenizer, one.misplaced))
        for group in range(len(data.group_names)):
            console.print(view.preview(data, group, tokenizer, marked=console.color_system is None))
    console.print(view.problems(one.problems))
