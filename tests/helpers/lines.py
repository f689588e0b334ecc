"""Files of prompts and of answers, as `accessory generate --lines` reads and writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HOW = ["--dtype", "fp32", "--device", "cpu", "--max-seq-len", "128", "--max-gen-len", "6"]
WORDS = ["One", "Two words", "Three", "Four", "Five", "Six", "Seven"]
ONE_ERROR = re.compile(r"accessory: error: [^\n]+\n")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_jsonl(path: Path, *lines: Any) -> None:
    """Writes a line for each value; a string is written as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
