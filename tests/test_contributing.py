"""The table "Where is …" of CONTRIBUTING.md: every file exists and defines the name that the row gives."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where is …\n")[1].split("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines() if line.startswith("|")][
    2:
]


def names_in(path: Path) -> set[str]:
    """The functions, classes and constants at a module's top."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def test_the_table_answers_at_least_twenty_questions():
    assert len(ROWS) >= 20


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_answer_is_there(row):
    _, files, names = (re.findall(r"`([^`]+)`", cell) for cell in row)
    assert 1 <= len(files) <= 2
    assert names
    found = set().union(*(names_in(ROOT / file) for file in files))
    assert set(names) <= found
