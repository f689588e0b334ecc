"""Options of `accessory generate` and `accessory chat` for images and sampling.

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

import argparse

from accessory.arguments import check_max_gen_len, check_max_seq_len, check_sampling, check_stops, option_of
from accessory.model.options import add_image_transform, add_option

MAX_GEN_LEN = 512  # tokens of an answer, where nothing else is said


def add_image_arguments(command: argparse.ArgumentParser, several: bool) -> None:
    """Declare `--image`, once for each prompt (`several`) or once for a dialogue, and the other options for images."""
    if several:
        help_ = "what the prompt is about; of several prompts, one each in their order, or none"
        command.add_argument("--image", action="append", default=[], metavar="PATH", help=help_)
    else:
        command.add_argument("--image", metavar="PATH", help="what the dialogue is about; /image PATH changes it")
    add_image_transform(command)
    add_option(command, "with_visual", action="store_true", help="load what the model sees with; --image does too")


def add_sampling_arguments(command: argparse.ArgumentParser) -> None:
    help_ = "tokens an answer may have (default: 512, at most half of --max-seq-len)"
    add_option(command, "max_gen_len", type=int, metavar="N", help=help_)
    command.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy")
    add_option(command, "top_p", type=float, default=0.95, metavar="X", help="nucleus of sampling (default: 0.95)")
    command.add_argument("--seed", type=int, metavar="N", help="makes sampling repeat")
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")


def check_text_options(options: argparse.Namespace) -> None:
    """Fill in what was left out. InputError for a value that the model would refuse, before anything is loaded."""
    check_max_seq_len(options.max_seq_len, option_of)
    if options.max_gen_len is None:
        options.max_gen_len = min(MAX_GEN_LEN, options.max_seq_len // 2)
    check_max_gen_len(options.max_gen_len, options.max_seq_len, option_of)
    check_sampling(options.temperature, options.top_p, options.seed, option_of)
    check_stops(options.stop, option_of)
