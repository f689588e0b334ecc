"""Finetune with the flags of the original project: `python main_finetune.py …`, alone, under torchrun or under srun.

Every field of `FinetuneConfig` is a flag. Flags that are left out have the original's defaults, with two exceptions.
The schedule differs, because the original's (400 epochs at 0.001) suits no mixture. Rows are packed unless --no_packing
is given.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_args, get_origin

if not __package__:  # started as a file: look for the package in this checkout, not for modules in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from accessory.errors import ConfigError
from accessory.train.config import FinetuneConfig, field_types, required_fields

# The original's defaults, where they differ from those of `FinetuneConfig`.
ORIGINAL_DEFAULTS: dict[str, Any] = {
    "output_dir": "./output_dir",
    "batch_size": 16,
    "accum_iter": 4,
    "weight_decay": 0.02,
    "clip_grad": -1,
    "max_words": 1024,
    "dialog": False,
    "num_workers": 2,
    "save_iteration_interval": 5000,
}

# Flags of the original that have no effect here, and why.
IGNORED = {
    "pretrained_type": "every published layout is recognised by itself",
    "log_dir": "what happens is written to output_dir; --loggers tensorboard adds its files there",
    "world_size": "the launcher says how many ranks there are",
    "local_rank": "the launcher says it",
    "dist_url": "the launcher says where ranks meet",
    "dist_on_itp": "torchrun's and Slurm's variables are read by themselves",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Finetune as the flags say. Returns the exit status: 0 done, 1 failed, 2 misused, 130 interrupted."""
    from accessory.commands.outcome import outcome

    options, unknown = parser().parse_known_args(argv)
    return outcome(lambda: _run(options, unknown), debug=options.debug)


def _run(options: argparse.Namespace, unknown: Sequence[str]) -> int:
    from accessory.commands.finetune import carry_out

    config, notes = read_flags(options, unknown)
    print("\n".join(f"note: {note}" for note in notes), end="\n" if notes else "")
    return carry_out(config, dry_run=options.dry_run)


def parser(config: type[FinetuneConfig] = FinetuneConfig) -> argparse.ArgumentParser:
    """A parser with a flag for every field, spelled with underscores or dashes. Flags that are not given are absent
    from its result."""
    p = argparse.ArgumentParser(
        prog="main_finetune.py",
        description="Finetune Mixtral-8x7B and its relatives, alone, under torchrun or under srun.",
        usage="%(prog)s --pretrained_path PATH --data_config FILE [flag ...]",
        epilog="Switches that are on are turned off by --no_NAME. docs/ has a tutorial.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    hints = field_types(config)
    for field in fields(config):
        name, hint, told = field.name, hints[field.name], _help(field)
        types = {get_origin(t) or t for t in (hint, *get_args(hint))}
        if bool in types:
            p.add_argument(*_spelled(name), action="store_const", const=True, help=told)
            if not name.startswith("no_"):
                p.add_argument(
                    *_spelled(f"no_{name}"), dest=name, action="store_const", const=False, help=argparse.SUPPRESS
                )
        elif types & {list, tuple}:
            p.add_argument(*_spelled(name), nargs="+", metavar="X", help=told)
        elif False in types:  # a switch or a name
            p.add_argument(*_spelled(name), nargs="?", const="true", metavar="TYPE", help=told)
        else:
            p.add_argument(*_spelled(name), metavar="X", help=told)
    for name in IGNORED:
        p.add_argument(*_spelled(name), nargs="?", help=argparse.SUPPRESS)
    p.add_argument(*_spelled("dry_run"), action="store_true", default=False, help="check and show, train nothing")
    p.add_argument("--debug", action="store_true", default=False, help="show tracebacks and what is going on")
    return p


def _spelled(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", "--" + name.replace("_", "-")]))


def _help(field: Field[Any]) -> str:
    value = ORIGINAL_DEFAULTS.get(field.name, field.default)
    told = isinstance(value, int | float | str) and not isinstance(value, bool)
    return field.metadata["help"] + (f" (default: {value})" if told else "")


def read_flags(
    options: argparse.Namespace, unknown: Sequence[str] = (), config: type[FinetuneConfig] = FinetuneConfig
) -> tuple[FinetuneConfig, list[str]]:
    """Make the configuration from parsed flags, with notes on the flags that have no effect here.

    Raises ConfigError for a flag that does not exist, is missing or has a wrong value.
    """
    names = [field.name for field in fields(config)]
    given = {name: value for name, value in vars(options).items() if name in names}
    for word in unknown:
        close = difflib.get_close_matches(word.split("=")[0], [f"--{name}" for name in names], n=1)
        raise ConfigError(f"{word}: unknown" + (f"; did you mean {close[0]}?" if close else "; --help lists all flags"))
    values = ORIGINAL_DEFAULTS | given
    missing = [f"--{name}" for name in required_fields(config) if name not in values]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: missing; --help lists all flags")
    notes = [f"--{name} is ignored: {why}" for name, why in IGNORED.items() if name in options]
    return config(**values), notes


if __name__ == "__main__":
    sys.exit(main())
