"""The documentation against the program: commands parse, links resolve, Python compiles, lists are up to date."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from accessory.cli import _parser

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for where in ("*.md", "docs/*.md", "examples/*.md", "benchmarks/*.md") for page in ROOT.glob(where))
SHELL = ("bash", "sh", "shell", "console")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# Shell words that end one command on a line. Another command may follow.
BETWEEN = ("|", "||", "&&", ";", ">", ">>", "<", "2>")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every `accessory …` command in the text of a shell block or of a transcript."""
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip().removeprefix("$ ")
        if "accessory" not in line:
            continue
        line = re.sub(r'"\$\([^"]*(?:"[^"]*"[^"]*)*\)"', "SUBSTITUTED", line)
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # the transcript has prose with an apostrophe here
            continue
        command: list[str] | None = None
        for word in [*words, ";"]:
            if word in BETWEEN:
                if command is not None:
                    yield command
                command = None
            elif command is not None:
                command.append(word)
            elif word == "accessory" or word.endswith("/accessory"):
                command = []


def all_commands() -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        for text in blocks(page, *SHELL):
            found += [(name_of(page), words) for words in commands(text)]
        for text in blocks(page, "text"):  # commands that the program proposes in a transcript
            proposed = "\n".join(line for line in text.splitlines() if line.strip().startswith(".venv/bin/accessory"))
            found += [(name_of(page), words) for words in commands(proposed)]
    return found


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def headings(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize(("page", "words"), all_commands(), ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_a_command_that_is_shown_can_be_read(page, words):
    try:
        options = _parser().parse_args(words)
    except SystemExit as ended:
        pytest.fail(f"{page}: accessory {' '.join(words)} ends with status {ended.code}")
    assert callable(options.run)


def test_commands_are_found_in_shell_lines():
    text = """
# a comment about accessory
$ accessory info x   # why
.venv/bin/accessory verify 'a b' c | awk 'END { print $NF }'
echo "1" | accessory generate p \\
    --prompt "a # b" > out.txt && accessory info y
accessory upcycle "$(python -c 'print(1)')" dst
pip install accessory-tools
"""
    assert list(commands(text)) == [
        ["info", "x"],
        ["verify", "a b", "c"],
        ["generate", "p", "--prompt", "a # b"],
        ["info", "y"],
        ["upcycle", "SUBSTITUTED", "dst"],
    ]
    assert len(all_commands()) > 20


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in headings(there)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_that_is_shown_compiles_and_its_imports_exist(page):
    for text in blocks(page, "python"):
        if text.lstrip().startswith(("def ", "@")):
            continue  # a signature out of the source
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("accessory"):
                module = importlib.import_module(str(node.module))
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{name_of(page)}: {node.module} has no {missing}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_in_the_package_that_are_shown_exist(page):
    """Every `accessory.module.name` in running text and tables exists."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for dotted in re.findall(r"`(accessory(?:\.\w+)+)", text):
        parts = dotted.split(".")
        for end in range(len(parts), 0, -1):
            try:
                value = importlib.import_module(".".join(parts[:end]))
                break
            except ModuleNotFoundError:
                continue
        for part in parts[end:]:
            assert hasattr(value, part), f"{name_of(page)}: {dotted}"
            value = getattr(value, part)
    for path in re.findall(r"`(accessory/[\w/]+\.(?:py|json))`", text):
        assert (ROOT / path).exists(), f"{name_of(page)}: {path}"


def reference():
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == reference().renewed(page), "run: python docs/reference.py"


def test_the_reference_names_every_option_and_method():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for name, parser in reference().command_parsers().items():
        section = page.partition(f"### accessory {name}\n")[2].partition("\n#")[0]
        assert section, name
        shown = set(re.findall(r"^\| `(--[\w-]+)", section, re.MULTILINE))
        assert shown == {a.option_strings[0] for a in parser._actions if a.option_strings} - {"-h"}
        assert all(row.split("|")[2].strip() for row in section.splitlines() if row.startswith("| `")), name
    written = ("generate", "stream_generate", "complete", "stream")
    for method in ("from_pretrained", *written, "compute_logits", "evaluate_examples"):
        assert f"### MetaModel.{method}\n" in page


def test_pages_speak_of_no_particular_machine():
    for page in PAGES:
        found = re.findall(r"(?:/tmp/|/home/|/root/)\S*", page.read_text(encoding="utf-8"))
        assert not found, f"{name_of(page)}: {found}"
