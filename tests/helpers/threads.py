"""Calls of several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from accessory.model.text_model import TextModel


def generate_in_threads(model: TextModel, prompt: str, lengths: Iterable[int]) -> dict[int, list[str]]:
    """By number of tokens, the answers that threads get which ask at once, each for another number."""
    found: dict[int, list[str]] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: model.generate([prompt], max_gen_len=n)}))  # type: ignore[misc]
        for n in lengths
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found
