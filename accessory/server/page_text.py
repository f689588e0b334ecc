"""Text for places where Gradio takes HTML or Markdown."""

from __future__ import annotations

import re

_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)
_CPP = re.compile(r"^([ >]*```)(?:cpp|c\+\+)(?=\s)", re.MULTILINE | re.IGNORECASE)


def without_html(text: str) -> str:
    """Markdown without HTML, so that `a<b` and `<tag>` appear unchanged. C++ is coloured as C: Gradio 6.31 drops it."""
    parts = _CODE.split(text)
    parts[::2] = [plain(part) for part in parts[::2]]
    return _CPP.sub(r"\1c", "".join(parts))


def plain(text: str) -> str:
    """Escape text for places where Gradio takes HTML. `>` stays: it begins quotations, and alone it is no tag."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
