"""Tables of measured tiles: which file is a card's, and which tile is for so many rows."""

from __future__ import annotations

import json

import pytest

from accessory.errors import ConfigError
from accessory.ops import tiles
from accessory.ops.tiles import Key

CARD = "NVIDIA H100 80GB HBM3"
PACKAGED = tiles.SHIPPED


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A cache and a shipped folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv(tiles.VARIABLE, raising=False)
    for folder in (tiles.cache_folder(), tiles.SHIPPED, tmp_path / "own"):
        folder.mkdir(parents=True)
    forget()
    yield tmp_path
    forget()


def forget():
    tiles.measured.cache_clear()
    tiles.table_of.cache_clear()


def write(path, M, rows=(12, 96)):
    found = [(Key("grouped", "int4", "up", most), {"M": M + most}, 1.0) for most in rows]
    path.write_text(json.dumps(tiles.as_json(CARD, found)))
    forget()


def tile(rows=1, card=CARD, format="int4", shape=(32, 16)):
    found = tiles.measured(card, "grouped", format, *shape, rows)
    return None if found is None else dict(found)["M"]


def test_a_tile_is_chosen_by_rows_shape_and_format():
    write(tiles.SHIPPED / "tiles-h100.json", 1000)
    assert [tile(rows) for rows in (1, 12, 12.5, 96, 5000)] == [1012, 1012, 1096, 1096, None]
    assert tile(format="int8") is tile(shape=(16, 32)) is tile(shape=(16, 16)) is None


def test_the_variable_wins_over_the_cache_and_that_over_what_is_shipped(places, monkeypatch):
    assert tile() is None
    write(tiles.SHIPPED / "tiles-h100.json", 1000)
    assert tile(card="NVIDIA H100 PCIe") == tile() == 1012
    assert tile(card="NVIDIA H200") is tile(card="NVIDIA H1000") is None
    write(tiles.SHIPPED / "tiles-h100-80gb-hbm3.json", 2000)
    assert tile() == 2012
    write(tiles.cache_folder() / "tiles-h100.json", 3000)
    assert tile() == 3012
    write(places / "own" / tiles.file_name(CARD), 4000)
    for value in (places / "own", places / "own" / "tiles-h100-80gb-hbm3.json"):
        monkeypatch.setenv(tiles.VARIABLE, str(value))
        forget()
        assert tile() == 4012


def test_tables_add_to_each_other():
    """Who tunes one size keeps what came along for the others."""
    write(tiles.SHIPPED / "tiles-h100.json", 1000)
    write(tiles.cache_folder() / "tiles-h100.json", 2000, rows=(4, 96))
    assert [tile(rows) for rows in (1, 4, 5, 12, 13)] == [2004, 2004, 1012, 1012, 2096]


@pytest.mark.parametrize("text", ["", "{}", '{"tiles": [{}]}', '{"tiles": 3}'])
def test_a_file_that_is_no_table_is_named(text):
    path = tiles.cache_folder() / tiles.file_name(CARD)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"tiles-h100-80gb-hbm3.json: not a table of tiles"):
        tile()


def test_a_variable_that_names_nothing_is_an_error(monkeypatch):
    monkeypatch.setenv(tiles.VARIABLE, "nowhere")
    with pytest.raises(ConfigError, match="ACCESSORY_TILES: got 'nowhere'"):
        tile()


def test_shipped_tables_have_tiles_of_kernels():
    pytest.importorskip("triton")
    from accessory.bench.tune import FAMILIES
    from accessory.ops.triton.grouped_experts import NAMES

    paths = list(PACKAGED.glob("*.json"))
    assert paths
    for path in paths:
        for key, found in tiles.read(path).items():
            family = next(family for family in FAMILIES if family.name == key.family)
            assert key.format in family.formats
            assert {*found, "MORE"} == set(NAMES), (path, key)
