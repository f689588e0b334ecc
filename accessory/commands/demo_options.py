"""The options of `accessory demo`. Only the standard library is imported here, so that `accessory --help` answers at
once."""

from __future__ import annotations

import argparse

from accessory.errors import InputError


def add_demo_arguments(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "--dir", default="demo-model", metavar="DIR", help="where its checkpoints go (default: demo-model)"
    )
    which = demo.add_mutually_exclusive_group()
    about = "teach it something, in some minutes: before, training, merged, after"
    which.add_argument("--finetune", action="store_true", help=about)
    about = "start a server with it, ask that through the package openai, and stop it"
    which.add_argument("--serve", action="store_true", help=about)
    demo.add_argument("--question", default="What is the capital of France?", metavar="TEXT", help="what it is asked")
    demo.add_argument(
        "--max-gen-len", type=int, default=40, metavar="N", help="tokens an answer may have (default: 40)"
    )


def check_demo_options(options: argparse.Namespace) -> None:
    """InputError for a question that asks nothing."""
    if not options.question.strip():
        raise InputError("--question: is blank; ask something")
