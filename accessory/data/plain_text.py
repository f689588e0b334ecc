"""A text file as rows of token ids, without a template: calibration reads one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from accessory.data.tokenizer import Tokenizer
from accessory.errors import InputError

_CHARACTERS = 2**20  # encoded in one go


def token_rows(path: str | Path, tokenizer: Tokenizer, *, tokens: int, length: int) -> Tensor:
    """The first `tokens` ids of a UTF-8 file, or as many as it has, in B rows of `length`: int64 (B, length).

    Each row begins with BOS where the tokenizer's texts do. Raises InputError for a file that cannot be read, and for
    one that is too short for one row.
    """
    if tokens < length:
        raise InputError(f"tokens: got {tokens}, but a row has {length} already")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(f"{path}: cannot be read ({reason})") from error
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    own = length - len(begin)  # tokens of a row that come from the text
    rows = tokens // length
    ids: list[int] = []
    for start in range(0, len(text), _CHARACTERS):
        ids += tokenizer.encode(text[start : start + _CHARACTERS], bos=False, prefix=start == 0)
        if len(ids) >= rows * own:
            break
    rows = min(rows, len(ids) // own)
    if not rows:
        raise InputError(f"{path}: has {len(ids)} tokens, fewer than the {own} of one row; give a longer text")
    return torch.tensor([begin + ids[n * own : (n + 1) * own] for n in range(rows)])
