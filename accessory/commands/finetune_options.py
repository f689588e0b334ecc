"""The options of `accessory finetune`.

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from accessory.command_line import Parser
from accessory.errors import InputError
from accessory.model.options import add_option

RECIPES = Path(__file__).parents[1] / "configs" / "finetune"
INIT = "init"  # in place of a recipe: make one
OF_INIT = ("model", "data", "gpus", "card", "gpu_memory", "train")


class _List(argparse.Action):
    """`--list`: print the recipes and end, as `--version` does."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print("\n".join(f"{name:<15} {about}" for name, about in recipes().items()))
        parser.exit()


def recipes() -> dict[str, str]:
    """The name of each recipe that comes with the package, and the line that says what it is: its first comment."""
    first = {path.stem: path.read_text(encoding="utf-8").partition("\n")[0] for path in sorted(RECIPES.glob("*.yaml"))}
    return {name: line.removeprefix("# ") for name, line in first.items()}


def add_finetune_arguments(finetune: Parser) -> None:
    about = f"a YAML file, or the name of a recipe: lora_one_gpu, …; or {INIT}, which writes one"
    finetune.add_argument("config", metavar="CONFIG", help=about)
    about = f"wins over what the file says; after {INIT}: the file to write (default: finetune.yaml)"
    finetune.add_argument("overrides", metavar="key=value", nargs="*", help=about)
    finetune.takes_more = True
    add_option(finetune, "n_gpus", type=int, metavar="N", help="ranks to start here; on a CPU, processes")
    add_option(finetune, "dry_run", action="store_true", help="check and show the recipe, train nothing")
    finetune.add_argument("--list", action=_List, help="print the names of the recipes that come along")
    finetune.add_argument("--model", metavar="PATH", help=f"{INIT}: the model to train")
    finetune.add_argument("--data", metavar="FILE", help=f"{INIT}: a data file, or a YAML of such files (META)")
    finetune.add_argument("--gpus", type=int, metavar="N", help=f"{INIT}: cards to train on (all here, else 1)")
    finetune.add_argument("--card", metavar="NAME", help=f"{INIT}: H200, H100, … (default: those that are here)")
    add_option(finetune, "gpu_memory", type=float, metavar="GB", help=f"{INIT}: of a card that has no name here")
    about = f"{INIT}: default: the first of them that fits"
    finetune.add_argument("--train", choices=("full", "lora", "qlora"), help=about)


def is_init(options: argparse.Namespace) -> bool:
    """Whether a recipe is to be written. A file that is called `init` is a recipe as any other.

    InputError for options that the other kind of call has.
    """
    if options.config == INIT and not Path(INIT).is_file():
        if options.n_gpus is not None:
            raise InputError(f"--n-gpus: starts ranks; for {INIT}, --gpus says how many cards there are")
        return True
    for name in OF_INIT:
        if getattr(options, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')}: is for `accessory finetune {INIT}`, which writes a recipe; leave it out"
            )
    return False
