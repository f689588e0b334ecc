"""What `mkdocs.yml` asks of Python: pages from outside `docs/`, and links that hold on the site too.

In the repository, pages link to each other as files. On the site all pages lie side by side. Files that are no pages
are copied, so that links to them hold; folders have no page, and a link to one becomes its name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Where pages of the repository are on the site.
PAGES = {
    "README.md": "index.md",
    "docs/README.md": "index.md",
    "benchmarks/README.md": "figures.md",
    "benchmarks/log.md": "versions.md",
    "examples/README.md": "examples.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
SOURCES = {page: source for source, page in PAGES.items() if source != "docs/README.md"}
API = """# Python

What a program of yours may use. [reference.md](docs/reference.md#metamodel) says the same of `MetaModel` in one piece.

::: accessory.model.meta.MetaModel
    options:
      inherited_members: true
      members:
        - from_pretrained
        - generate
        - stream_generate
        - complete
        - stream
        - answers
        - compute_logits
        - evaluate_examples
        - warm_up

::: accessory.model.multi_gpu_wrapper.MultiGpuWrapper

::: accessory.engine.sampling_params.SamplingParams

::: accessory.model.writing.Completion

::: accessory.data.conversation.Conversation

::: accessory.errors
"""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in SOURCES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "api.md", content=API))
    linked = {path for source in _texts() for path in _targets(*source) if (ROOT / path).is_file()}
    for path in sorted(linked):
        if path not in PAGES and not path.startswith("docs/"):
            files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    folder = posixpath.dirname(SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    if page.file.src_uri == "api.md":
        folder = ""

    def on_the_site(found: re.Match[str]) -> str:
        image, text, link = found.groups()
        path, hash_, anchor = link.partition("#")
        if not path or ":" in path:
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, path))
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif (ROOT / path).is_dir():
            return text
        else:
            path = f"files/{path}"
        return f"{image}[{text}]({path}{hash_}{anchor})"

    return LINK.sub(on_the_site, markdown)


def _texts() -> list[tuple[str, str]]:
    """(folder, text) of every page of the repository that the site shows."""
    sources = [*map(Path, SOURCES.values()), *(p.relative_to(ROOT) for p in sorted((ROOT / "docs").glob("*.md")))]
    return [(source.parent.as_posix(), (ROOT / source).read_text()) for source in sources]


def _targets(folder: str, text: str) -> list[str]:
    """The files that a page links to, from the repository's root."""
    links = (found[3].partition("#")[0] for found in LINK.finditer(text))
    return [posixpath.normpath(posixpath.join(folder, link)) for link in links if link and ":" not in link]
