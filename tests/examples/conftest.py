from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from examples.emoji import corpus
from examples.emoji.corpus import GROUPS


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Packages as npm unpacks them: four drawings a group, and one with a skin tone, which is not in Unicode's list."""
    Image = pytest.importorskip("PIL.Image", reason="pip install pillow")
    home = tmp_path / "packages"
    assets = home / "fluent-emoji-3d" / "assets"
    (home / "unicode-emoji-json").mkdir(parents=True)
    assets.mkdir(parents=True)
    told = {}
    for n in range(9 * 4):
        text = chr(0x1F600 + n) + ("\ufe0f" if n % 3 == 0 else "")
        told[text] = {"name": f"thing {n}", "slug": "x", "group": GROUPS[n % 9]}
        values = np.random.default_rng(n).integers(0, 256, (40, 40, 4), np.uint8)
        name = corpus.code_of(text) if n % 2 else corpus.plain(corpus.code_of(text))
        Image.fromarray(values, "RGBA").save(assets / f"{name}.webp", lossless=True)
    Image.new("RGBA", (40, 40)).save(assets / "1f44d-1f3fb.webp")
    (home / "unicode-emoji-json" / "data-by-emoji.json").write_text(json.dumps(told), encoding="utf-8")
    return home
