"""The options of `accessory finetune`.

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

from accessory.command_line import Parser
from accessory.model.options import add_option


def add_finetune_arguments(finetune: Parser) -> None:
    finetune.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a recipe: lora_one_gpu, …")
    finetune.add_argument("overrides", metavar="key=value", nargs="*", help="wins over what the file says")
    finetune.takes_more = True
    add_option(finetune, "n_gpus", type=int, metavar="N", help="ranks to start here; on a CPU, processes")
    add_option(finetune, "dry_run", action="store_true", help="check and show the recipe, train nothing")
