"""The emoji example: names, families, held-out emoji, questions, and how answers are counted."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest
from helpers.emoji import make
from hypothesis import given
from hypothesis import strategies as st

from examples.emoji import corpus
from examples.emoji.corpus import GROUPS, KINDS

pytest.importorskip("PIL", reason="pip install pillow")


@pytest.mark.parametrize(
    "names",
    [
        ["man detective", "woman detective", "detective"],
        ["person running", "man running", "woman running facing right", "person running: dark skin tone"],
        ["man red hair", "woman white hair", "person bald"],
        ["family man, woman, boy", "family woman, girl"],
        ["merman", "mermaid", "merperson"],
        ["backhand index pointing left", "backhand index pointing up"],
        ["leftwards hand", "rightwards hand"],
        ["prince", "princess", "person with crown"],
        ["Santa Claus", "Mrs. Claus", "mx claus"],
    ],
)
def test_people_who_only_vary_have_one_stem(names: list[str]) -> None:
    assert len({corpus.stem(make("x", name, "People & Body")) for name in names}) == 1


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("Symbols", ["up arrow", "down-left arrow", "left-right arrow"]),
        ("Symbols", ["keycap #", "keycap 10"]),
        ("Symbols", ["red circle", "blue circle"]),
        ("Symbols", ["large orange diamond", "small blue diamond"]),
        ("Travel & Places", ["one o’clock", "twelve-thirty"]),
        ("Smileys & Emotion", ["red heart", "light blue heart"]),
    ],
)
def test_plain_shapes_have_one_stem(group: str, names: list[str]) -> None:
    assert len({corpus.stem(make("x", name, group)) for name in names}) == 1


def test_others_have_stems_of_their_own() -> None:
    names = ["grinning face", "flag Chad", "flag Romania", "red apple", "notebook", "right arrow curving left"]
    names += ["up arrow", "broken heart", "clockwise vertical arrows"]
    assert len({corpus.stem(make("x", name, "Symbols")) for name in names}) == len(names)
    assert corpus.stem(make("x", "eye", "People & Body")) != corpus.stem(make("x", "eye", "Symbols"))


def test_drawings_that_hardly_differ_are_a_family() -> None:
    some = [make("x", name, "Objects") for name in ("saw", "axe", "bow", "key")]
    thumbnails = np.zeros((4, 100))
    thumbnails[1] += 0.04  # near to the first, and the third is near to it
    thumbnails[2] += 0.08
    thumbnails[3] += 0.5
    found = corpus.families(some, thumbnails)
    assert found[0] == found[1] == found[2] != found[3]


def test_distances_are_of_all_pixels() -> None:
    """Two thumbnails are in one family exactly if a chain of near ones joins them (checked with Floyd-Warshall)."""
    generator = np.random.default_rng(0)
    thumbnails = generator.random((25, 6)) * 0.25
    some = [make("x", f"thing {n}", "Objects") for n in range(25)]
    near = np.sqrt(((thumbnails[:, None] - thumbnails[None]) ** 2).mean(-1)) < 0.05
    for k in range(25):
        near |= near[:, [k]] & near[[k]]
    found = np.array(corpus.families(some, thumbnails))
    assert np.array_equal(found[:, None] == found[None], near)
    assert 1 < len(set(found)) < 25


@given(
    st.lists(st.tuples(st.sampled_from("AB"), st.integers(0, 12)), min_size=1, max_size=60),
    st.floats(0, 1),
    st.integers(0, 3),
)
def test_a_family_is_on_one_side_and_no_group_gives_more_than_its_share(
    told: list[tuple[str, int]], share: float, seed: int
) -> None:
    groups, family = [g + str(f % 2) for g, f in told], [f for _, f in told]
    kept = corpus.held_out(groups, family, share, seed)
    assert not {family[n] for n in kept} & {f for n, f in enumerate(family) if n not in kept}
    assert corpus.held_out(groups, family, share, seed) == kept
    assert len(kept) <= share * len(told) + len(set(groups)) / 2


def test_the_share_is_taken_from_every_group() -> None:
    groups, family = ["a"] * 100 + ["b"] * 50, list(range(150))
    kept = corpus.held_out(groups, family, 0.18, 0)
    assert Counter(groups[n] for n in kept) == {"a": 18, "b": 9}
    assert corpus.held_out(groups, family, 0.18, 1) != kept


def test_mirror_images() -> None:
    turning = [("dog face", "Animals & Nature"), ("bright button", "Objects")]
    fixed = [("flag Chad", "Flags"), ("up arrow", "Symbols"), ("leftwards hand", "People & Body")]
    fixed += [("one o’clock", "Travel & Places"), ("first quarter moon", "Travel & Places")]
    assert all(make("x", *told).turns for told in turning)
    assert not any(make("x", *told).turns for told in fixed)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_told_by_its_name_alone(group: str) -> None:
    emoji = make("x", "thing", group)
    for kind in ("group", "brief", "both"):
        assert corpus.group_of(corpus.answer(kind, emoji)) == group
    assert corpus.group_of(f"It is in {group.upper()}.") == group
    assert corpus.group_of(corpus.answer("name", emoji)) is None
    assert corpus.group_of(group[:-1]) is None
    assert corpus.group_of(f"Non{group.lower()}") is None


def test_what_names_no_group_or_several_is_none() -> None:
    for reply in ("", "Food", "Food and Drink", "Animals", "Fl ags", ", ".join(GROUPS), "Objects or Symbols"):
        assert corpus.group_of(reply) is None
    assert corpus.group_of("Food &\n Drink, Food & Drink") == "Food & Drink"


def test_a_name_counts_when_nothing_else_is_said() -> None:
    assert corpus.is_name(" Grinning face.", "grinning face")
    assert not corpus.is_name("grinning face with big eyes", "grinning face")
    assert not corpus.is_name("", "grinning face")


def test_questions_list_all_groups() -> None:
    for kind in ("group", "both"):
        assert all(group in question for question in KINDS[kind] for group in GROUPS)
    lines = corpus.items(make("x", "saw", "Objects"), "a.webp", ("name", "group", "both"), random.Random(0))
    told = [json.loads(line) for line in lines]
    assert [t["conversations"][1] for t in told] == [
        {"from": "gpt", "value": text} for text in ("saw", "Objects", "saw: Objects")
    ]
    assert all(t["image"] == "a.webp" and t["conversations"][0]["value"] in KINDS["name"] for t in told[:1])
