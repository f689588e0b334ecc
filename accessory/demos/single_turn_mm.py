"""A web page that answers one question at a time, about an image or without one:
`torchrun --nproc-per-node=N demos/single_turn_mm.py --pretrained_path PATH`.

With the system prompt caption, or with None and an empty question, the prompt is the image alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: look for the package in this checkout, not for modules in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from accessory.demos import single_turn
from accessory.demos.page import Ask, Message


def _ask(tokenizer: Any, history: Sequence[Message], input: str, system_prompt: str) -> Ask:
    ask = single_turn.DEMO.ask(tokenizer, history, input, system_prompt)
    if not ask.prompt and "image" in history[-1] and tokenizer.bos_id is not None:
        return replace(ask, prompt=[tokenizer.bos_id])  # the image comes after BOS
    return ask


DEMO = replace(
    single_turn.DEMO,
    title="Single turn, with an image",
    about="One question about an image, or without one, and one answer. For finetuned models keep the system prompt "
    "they know; for pretrained ones take None, or caption.",
    images=True,
    ask=_ask,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C. Returns the exit status."""
    return single_turn.main(argv, DEMO, "single_turn_mm.py")


if __name__ == "__main__":
    sys.exit(main())
