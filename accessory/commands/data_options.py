"""The options of `accessory data check`. Only the standard library is imported here, so that `accessory --help` answers
at once."""

from __future__ import annotations

import argparse

from accessory.data.template_names import TEMPLATES
from accessory.model.options import add_json_option, add_option


def add_data_check_arguments(check: argparse.ArgumentParser) -> None:
    check.add_argument(
        "config",
        metavar="CONFIG",
        help="a data file, a YAML of such files (META), or of a finetune, whose choices count",
    )
    check.add_argument("--model", metavar="PATH", help="a model or a tokenizer, file or folder (default: CONFIG's)")
    add_option(check, "max_words", type=int, metavar="N", help="tokens of a row (default: 4096)")
    check.add_argument("--template", choices=TEMPLATES, help="of dialogues (default: default)")
    flag = argparse.BooleanOptionalAction
    check.add_argument("--dialog", action=flag, help="whether single turns are dialogues of two messages (default)")
    check.add_argument("--packing", action=flag, help="whether several items share a row (default)")
    add_option(check, "batch_size", type=int, metavar="N", help="rows a GPU sees at once (4)")
    add_option(check, "accum_iter", type=int, metavar="N", help="micro-steps a step (1)")
    check.add_argument("--gpus", type=int, metavar="N", help="of the run (default: the fewest that suit CONFIG)")
    check.add_argument("--epochs", type=float, metavar="X", help="times every item is seen (1)")
    add_option(check, "tokens_per_second", type=float, metavar="X", help="of all GPUs together")
    add_json_option(check)
