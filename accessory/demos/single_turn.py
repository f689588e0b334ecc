"""A web page that answers one question at a time:
`torchrun --nproc-per-node=N demos/single_turn.py --pretrained_path PATH`.

For pretrained models choose the system prompt None. The model then continues the question itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: look for the package in this checkout, not for modules in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from accessory.data.system_prompt import SYSTEM_PROMPTS, format_prompt
from accessory.demos import serving
from accessory.demos.page import Ask, Demo, Message, import_gradio


def _below(tokenizer: Any) -> list[Any]:
    box = import_gradio().Textbox(
        label="Input", lines=1, max_lines=10, elem_id="input", placeholder="Optional; only alpaca has a place for it"
    )
    return [box]


def _settings(tokenizer: Any) -> list[Any]:
    box = import_gradio().Dropdown(
        list(SYSTEM_PROMPTS), value="alpaca", label="System prompt", elem_id="system_prompt",
        info="None for pretrained models: the question as it stands",
    )  # fmt: skip
    return [box]


def _ask(tokenizer: Any, history: Sequence[Message], input: str, system_prompt: str) -> Ask:
    return Ask(format_prompt(history[-1]["content"], input, system_prompt))


DEMO = Demo(
    title="Single turn",
    about="One question, one answer. For finetuned models keep the system prompt they know; for pretrained ones take "
    "None.",
    chat=False,
    below=_below,
    settings=_settings,
    ask=_ask,
)


def main(argv: Sequence[str] | None = None, demo: Demo = DEMO, program: str = "single_turn.py") -> int:
    """Serve the page until Ctrl-C. Returns the exit status."""
    about = "Answer single questions on a web page; start it with torchrun."
    parser = serving.parser(program, about, images=demo.images)
    return serving.run(demo, parser.parse_args(argv), serving.start_launched)


if __name__ == "__main__":
    sys.exit(main())
