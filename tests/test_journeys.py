"""Runs the journeys of docs/architecture.md. Each is a list of calls, which must happen in that order."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


def journeys() -> dict[str, list[str]]:
    """Map each journey's title to the calls that it lists, by their names within `accessory`."""
    section = PAGE.read_text(encoding="utf-8").split("\n## Journeys\n")[1].split("\n## ")[0]
    found = {}
    for part in section.split("\n### ")[1:]:
        title, _, text = part.partition("\n")
        found[title] = re.findall(r"^\d+\. `([\w.]+)`", text, re.MULTILINE)
    return found


class Calls:
    """Records the names of the package's functions in the order of their first calls, while the context is open."""

    def __init__(self) -> None:
        self.first: dict[str, int] = {}

    def __enter__(self) -> Calls:
        sys.setprofile(self._note)
        threading.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame, event, _argument) -> None:
        if event != "call":
            return
        module = frame.f_globals.get("__name__", "")
        if module.startswith("accessory."):
            name = f"{module.removeprefix('accessory.')}.{frame.f_code.co_qualname}"
            self.first.setdefault(name, len(self.first))


def check(title: str, calls: Calls) -> None:
    wanted = journeys()[title]
    assert len(wanted) >= 5, f"{title}: the page lists {len(wanted)} calls"
    missing = [name for name in wanted if name not in calls.first]
    assert not missing, f"{title}: never called: {missing}"
    order = sorted(wanted, key=lambda name: calls.first[name])
    assert order == wanted, f"{title}: they come as {order}"


def test_the_page_has_the_five_journeys():
    assert list(journeys()) == ["Text out", "An HTTP request", "An image", "A finetune", "A conversion"]


def test_text_out(tmp_path):
    from helpers.random_models import write_speaking
    from helpers.sizes import SPEAKING

    from accessory.model.meta import MetaModel

    write_speaking(tmp_path / "model", SPEAKING)
    with Calls() as calls:
        MetaModel.from_pretrained(tmp_path / "model", device="cpu").generate(["The"], max_gen_len=3)
    check("Text out", calls)


def test_an_http_request(tmp_path):
    pytest.importorskip("fastapi", reason="the server's packages are not installed")
    from helpers.live_server import serving
    from helpers.random_models import write_speaking
    from helpers.sizes import SPEAKING

    from accessory.commands.api_client import Server

    write_speaking(tmp_path / "model", SPEAKING)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "The"}], "max_tokens": 3}
    with Calls() as calls, serving(tmp_path / "model", max_seq_len=128) as (url, _):
        assert list(Server(url).stream("/v1/chat/completions", body))
    check("An HTTP request", calls)


def test_an_image(tmp_path):
    pytest.importorskip("PIL", reason="Pillow is not installed")
    from helpers.pictures import gradient
    from helpers.seeing import write_seeing

    from accessory.model.meta import MetaModel

    folder = write_seeing(tmp_path / "model")
    with Calls() as calls:
        model = MetaModel.from_pretrained(folder, with_visual=True, device="cpu")
        model.generate(["What is it?"], images=[gradient(12, 9)], max_gen_len=2)
    check("An image", calls)


def test_a_finetune(tmp_path):
    from helpers import runs

    inputs = runs.write_inputs(tmp_path / "inputs")
    with Calls() as calls:
        runs.finetune(inputs, tmp_path / "run", max_steps=2)
    check("A finetune", calls)


def test_a_conversion(tmp_path):
    from helpers.checkpoints import ARGS, random_tensors, write_hf

    from accessory.convert.convert import convert
    from accessory.convert.verify import verify

    source = write_hf(tmp_path / "hf", random_tensors(ARGS), ARGS)
    with Calls() as calls:
        convert(source, tmp_path / "base", to="base", shards=2, progress=False)
        assert verify(source, tmp_path / "base").ok
    check("A conversion", calls)
