"""The emoji example: scores, tables and a page of pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.emoji import make
from hypothesis import given
from hypothesis import strategies as st

from examples.emoji import data, evaluate
from examples.emoji.corpus import GROUPS
from examples.emoji.evaluate import GREY, NONE, OTHER, OWN, SIGHTS, Said

pytest.importorskip("PIL", reason="pip install pillow")
from PIL import Image


class Parrot:
    """A stand-in for a model. It repeats an image that is a string, and answers "Flags" where there is no image."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    tokenizer = None

    def generate(self, prompts: list[str], images: list[object] | None, **_: object) -> list[str]:
        self.calls.append(len(prompts))
        return [self._say(image) for image in images or [None] * len(prompts)]

    def _say(self, image: object) -> str:
        if image is None:
            return "Flags"
        return image if isinstance(image, str) else "Symbols"


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Parrot:
    class Template:
        stop_strings = ()

        def reply(self, text: str) -> str:
            return text

    class Talk:
        def __init__(self, template: object) -> None:
            pass

        def add(self, role: str, text: str) -> Talk:
            return self

        def prompt_ids(self, tokenizer: object) -> str:
            return "q"

    monkeypatch.setattr(evaluate, "get_template", lambda *_: Template())
    monkeypatch.setattr(evaluate, "Conversation", Talk)
    return Parrot()


def test_scores_with_and_without_the_picture(parrot: Parrot) -> None:
    groups = ["Flags"] * 3 + ["Objects"] * 2 + ["Symbols"]
    some = [make("x", f"thing {n}", group) for n, group in enumerate(groups)]
    shown = ["Flags", "Flags", "nothing", "Objects", "Flags", "Symbols"]
    results = evaluate.examine(parrot, some, shown, "group", None, batch=4)  # type: ignore[arg-type]
    told = evaluate.summary({"Fluent": results})["Fluent"]
    assert set(results) == set(SIGHTS)
    assert told["accuracy"][OWN] == 4 / 6
    assert told["accuracy"][NONE] == told["majority"] == 3 / 6
    assert told["accuracy"][GREY] == 1 / 6
    assert told["no_group"] == {OWN: 1, NONE: 0, GREY: 0, OTHER: 1}
    assert told["groups"]["Objects"] == {"emoji": 2, "right": 1, "named": 0}
    assert sorted(s.group for s in results[OTHER]) == sorted(shown)
    assert parrot.calls == [4, 2, 4, 2, 1, 1]


@given(st.integers(2, 40), st.integers(0, 5))
def test_nobody_is_shown_its_own_picture(count: int, seed: int) -> None:
    found = evaluate.others(count, seed)
    assert sorted(found) == list(range(count))
    assert all(other != n for n, other in enumerate(found))


def test_the_names_are_counted_only_where_asked(parrot: Parrot) -> None:
    some = [make("x", "Flags", "Flags"), make("y", "saw", "Objects")]
    results = evaluate.examine(parrot, some, ["Flags", "Objects"], "brief", None, 8, name=False)  # type: ignore[arg-type]
    assert evaluate.summary({"a": results})["a"]["named"] is None
    results = evaluate.examine(parrot, some, ["Flags", "Objects"], "brief", None, 8)  # type: ignore[arg-type]
    assert evaluate.summary({"a": results})["a"]["named"] == 0.5


def test_the_page_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "fluent").mkdir()
    everyone, said = [], []
    for n in range(30):
        emoji = make(chr(0x1F600 + n), "thing with a name that is much too long", GROUPS[n % 9])
        path = f"fluent/{emoji.code}.webp"
        Image.new("RGBA", (32, 32), (200, 0, 0, 255)).save(tmp_path / path)
        everyone.append(data.Pictured(emoji, n, True, path, None))
        said.append(Said(emoji, GROUPS[n % 8], "something"))
    chosen = evaluate.pick(everyone, said, tmp_path, "Fluent")
    assert 20 <= len(chosen) <= 28
    assert {c[1].emoji.group for c in chosen} == set(GROUPS)
    evaluate.page(chosen, tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert image.width > 1000
        colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {(20, 120, 50), (180, 30, 30)} <= colours
