"""`accessory tune`: the quickest tile is kept, on a family of kernels that is made for the test and runs on a CPU."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from accessory.bench.tune import Compiling, Family, _compile, compile_ahead, to_compile, tune
from accessory.cli import _parser, main
from accessory.commands.tune import run
from accessory.config import PRESETS
from accessory.ops import tiles
from accessory.ops.dense_products import grouped_loop

TILES = [{"M": 1}, {"M": 2}, {"M": 3}]


def product(problem, x_NI, count_E, tile):
    """Tile 3 has no room on this card, and 1 is slow."""
    assert int(count_E.sum()) == len(x_NI)
    M = 1 if tile is None else tile["M"]
    if M == 3:
        raise RuntimeError("out of shared memory")
    time.sleep(0.002 if M == 1 else 0)
    return grouped_loop(x_NI, problem.weight, count_E)


def test_the_quickest_tile_that_runs_is_kept(tmp_path, capsys):
    out, family = tmp_path / "tiles-a-card.json", Family("mine", ("none",), lambda *_: TILES, product)
    words = ["tune", "--sizes", "tiny", "--rows"]
    for rows in ("3", "1"):  # the second run keeps what the first one found
        options = _parser().parse_args([*words, rows, "--format", "none", "int8"])
        assert run(options, "a card", torch.device("cpu"), out, (family,)) == 0
    found = tiles.read(out)
    assert found == {tiles.Key("mine", "none", kind, rows): {"M": 2} for kind in ("up", "down") for rows in (1, 3)}
    assert f"{out}: written" in capsys.readouterr().out


def test_a_family_of_which_no_tile_runs_is_a_bug(tmp_path):
    family = Family("mine", ("none",), lambda *_: TILES[2:], product)
    options = _parser().parse_args(["tune", "--sizes", "tiny", "--format", "none"])
    with pytest.raises(RuntimeError, match="no tile can run"):
        run(options, "a card", torch.device("cpu"), tmp_path / "x.json", (family,))
    assert list(tmp_path.iterdir()) == []


def noted(problem, x_NI, count_E, tile):
    """Where a process would compile a kernel, one that the tests look at leaves a file."""
    if tile is None or "folder" not in tile:
        return product(problem, x_NI, count_E, tile)
    name = "-".join(map(str, (problem.format, *problem.weight.shape, tile["M"])))
    with (Path(tile["folder"]) / name).open("a") as file:
        file.write("run\n")
    return product(problem, x_NI, count_E, {"M": 2})


def test_every_tile_is_compiled_once_in_processes_before_it_is_timed(tmp_path):
    """One that cannot run ends no process, and is not tried again."""
    tiles_here = [{"M": M, "folder": str(tmp_path)} for M in (1, 2, 8, 512)]
    family = Family("mine", ("none",), lambda *_: [*tiles_here, *tiles_here[:2], TILES[2]], noted)
    ahead = to_compile(PRESETS["tiny"], ["none", "int8"], [1, 4], (family,))
    assert len(ahead) == 2 * 4  # of both weights; no expert has rows enough for 512
    parts = list(compile_ahead(ahead, torch.device("cpu"), processes=2))
    assert sum(count for count, _ in parts) == len(ahead)
    refused = [one for _, some in parts for one in some]
    assert len(refused) == 2
    assert all(one in refused for one in ahead if one.tile == TILES[2])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        f"none-4-{out}-{into}-{M}": 2 * "run\n" for out, into in ((96, 64), (64, 96)) for M in (1, 2, 8)
    }
    with pytest.raises(RuntimeError, match="no tile can run"):
        next(tune(PRESETS["tiny"], ["none"], torch.device("cpu"), rows=[1], families=[family], refused=ahead))


def without_memory(problem, x_NI, count_E, tile):
    raise torch.OutOfMemoryError


def test_a_tile_that_found_no_memory_beside_other_processes_is_timed_all_the_same():
    one = Compiling(without_memory, "none", (4, 96, 64), False, {"M": 1})
    assert _compile(([one], torch.device("cpu"))) == (1, [])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "nowhere/x.json"], "--out: nowhere/x.json cannot be written"),
        (["--rows", "0"], "--rows: got 0"),
        (["--sizes", "tiny", "--format", "int4"], "--format int4: its rows of 64 numbers"),
        ([], "accessory tune: it times a GPU's kernels, and torch sees no GPU here"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_mistake_is_one_line(capsys, monkeypatch, options, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tune", *options]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
