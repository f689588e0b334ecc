"""Whether BOS begins every item of finetuning data, and stands nowhere else: `check_bos`."""

from __future__ import annotations

import numpy as np

from accessory.data.dataset import FinetuneData
from accessory.data.records import place
from accessory.data.template_base import Template
from accessory.data.tokenizer import Tokenizer


def check_bos(data: FinetuneData, tokenizer: Tokenizer, template: Template) -> list[str] | None:
    """What is wrong with each item, by file and line; None where neither tokenizer nor template begins with BOS."""
    if not template.begins_with_bos(tokenizer):
        return None
    bos = tokenizer.bos_id
    problems = []
    for file in data.files:
        e = file.encoded
        if not len(e.lines):
            continue
        numbers = np.add.reduceat(e.ids == bos, e.start[:-1], dtype=np.int64)
        begins = e.ids[e.start[:-1]] == bos
        for item in np.flatnonzero((numbers != 1) | ~begins).tolist():
            where = place(file.source.path, int(e.lines[item]))
            what = f"{numbers[item]} times" if numbers[item] != 1 else "once, but not at the beginning"
            problems.append(
                f"{where}: BOS ({tokenizer.bos_token}, id {bos}) is there {what}; it must begin the item, once"
            )
    return problems
