"""`accessory bench` and `tune` on a GPU: graphs, kernels of a step, peers that are compiled, tiles."""

from __future__ import annotations

import json

import pytest
import torch

from accessory.bench import tune as tuning
from accessory.cli import main
from accessory.commands import tune
from accessory.ops import tiles

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def bench(tmp_path, what, *options):
    out = tmp_path / "out.json"
    assert main(["bench", "tiny", "--what", what, "--out", str(out), *options]) == 0
    found = json.loads(out.read_text())
    assert all(figure["seconds"] for figure in found["figures"]), found["figures"]
    return found


def test_kernels_of_a_decoding_step_add_up(tmp_path):
    short = ("--context", "16", "--tokens", "16", "--batch", "1", "4")
    found = bench(tmp_path, "decode", "--kernels", "--format", "none", "int8", *short)
    assert len(found["kernels"]) == 4
    for rows in found["kernels"].values():
        *each, every, speaking, gaps = rows
        assert every["a_layer"] == pytest.approx(sum(row["a_layer"] for row in each))
        assert 0 < every["share"] < 1.2
        assert speaking["share"] == 0
        assert gaps["share"] == pytest.approx(max(0, 1 - every["share"]))
        # A layer has attention, and products of its own.
        assert every["a_layer"] > 3


def test_a_layer_is_timed_as_a_graph_beside_grouped_mm(tmp_path):
    found = bench(tmp_path, "layer", "--tokens", "1", "64", "2048", "--vs", "grouped_mm", "--format", "none", "int8")
    assert not [figure["note"] for figure in found["figures"] if figure["note"]]


def test_transformers_is_compiled(tmp_path):
    found = bench(tmp_path, "decode", "--context", "16", "--tokens", "8", "--batch", "1", "--vs", "transformers")
    assert found["figures"][0]["who"] == "transformers batched_mm, compiled"


def test_tiles_are_measured_and_found(tmp_path, monkeypatch):
    """A few of the tiles: to compile all takes minutes."""
    pytest.importorskip("triton")
    few = tuple(f._replace(candidates=lambda *weight, f=f: f.candidates(*weight)[::24]) for f in tuning.FAMILIES)
    monkeypatch.setattr(tune.run, "__defaults__", (few, 1))
    out = tmp_path / "tiles.json"
    command = ["tune", "--sizes", "tiny", "--format", "none", "int8", "--rows", "3", "--out", str(out)]
    assert main(command) == 0
    monkeypatch.setenv(tiles.VARIABLE, str(out))
    tiles.table_of.cache_clear()
    tiles.measured.cache_clear()
    try:
        for family, format in (("grouped", "none"), ("packed_grouped", "int8")):
            assert dict(tiles.measured(torch.cuda.get_device_name(), family, format, 96, 64, 2))["M"] >= 16
    finally:
        tiles.table_of.cache_clear()
        tiles.measured.cache_clear()
