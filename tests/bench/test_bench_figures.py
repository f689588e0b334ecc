"""Figures and their tables, sums of kernels, and the pages that keep them, on values written by hand."""

from __future__ import annotations

import json

import pytest

from accessory.bench import figures, kernels, pages, roofline
from accessory.bench.card import Card
from accessory.bench.figures import Figure
from accessory.errors import InputError, MissingExtraError

CARD = Card("a card", copy=2e12, matmul=5e14, dtype="bfloat16", torch="2.11")
OURS = Figure(who="accessory sparse int8", what="w", format="int8", seconds=3e-3, tokens=6, nbytes=2e9, operations=1e9)
PEERS = [
    Figure(who="quick", what="w", seconds=2e-3, peer=True),
    Figure(who="alike", what="w", format="int8", seconds=6e-3, peer=True),
    Figure(who="other work", what="v", format="int8", seconds=1e-3, peer=True),
    Figure(who="failed", what="w", format="int8", peer=True).failed(ValueError("no\nroom")),
]


def test_the_floor_is_the_larger_of_bytes_and_operations():
    assert OURS.floor(CARD) == 1e-3
    assert Figure(who="", what="", nbytes=2e9, operations=1e12).floor(CARD) == 2e-3
    assert Figure(who="", what="", seconds=1.0).times_floor(CARD) is None


def test_a_peer_did_the_same_work_with_the_same_format_if_any_did():
    assert figures.peer_speed(OURS, [*PEERS, OURS]) == 2.0
    assert figures.peer_speed(OURS, [PEERS[0]]) == pytest.approx(2 / 3)
    assert figures.peer_speed(OURS, PEERS[2:]) is None
    assert figures.peer_speed(PEERS[0], PEERS) is None


def test_a_table_and_a_line_of_a_log():
    every = [*PEERS, OURS]
    lines = figures.table(every, CARD)
    assert lines[0] == "| who | what | ms | tokens/s | times the floor | times the peer's speed | peak, GB |"
    assert lines[-1] == "| accessory sparse int8 | w | 3.00 | 2,000 | 3.00 | 2.00 | – |"
    assert lines[-2] == "| failed | w | ValueError: no | – | – | – | – |"
    assert figures.in_short(every, CARD) == "accessory sparse int8, w: 3.00 ms (3.00 × floor, 2.00 × peer)"
    found = json.loads(json.dumps(figures.as_json(OURS, every, CARD)))
    assert (found["floor_seconds"], found["times_peer_speed"], found["tokens_per_second"]) == (1e-3, 2.0, 2000)


def test_kernels_of_a_step():
    """Two replays of two layers: a product a layer, a sum over ranks a layer, one copy.

    The sums take their place 3 µs before the products end, and wait.
    """
    product, total = "void gemm_kernel_of_mine<int, 3>(float*)", "ncclDevKernel_AllReduce_Sum"
    replay = [(product, 0.0, 10.0), (total, 7.0, 14.0), (product, 14.0, 24.0), (total, 21.0, 28.0)]
    once = [*replay, ("Memcpy DtoD", 30.0, 32.0)]
    again = [(name, begin + 40, end + 40) for name, begin, end in once]
    rows = kernels.rows_of([*once, *again], replays=2, layers=2, step=40.0)
    assert [kernel.name for kernel in rows[:3]] == ["gemm_kernel_of_mine", "ncclDevKernel_AllReduce_Sum", "Memcpy DtoD"]
    assert rows[0][1:] == (1.0, 10.0, 0.5)
    assert rows[2][1:] == (0.5, 2.0, 0.05)
    every, speaking, gaps = rows[3:]
    assert every[1:] == pytest.approx((2.5, 6.0, 0.75))
    assert speaking[1:] == pytest.approx((1.0, 4.0, 0.2))
    assert gaps.share == pytest.approx(0.25)
    assert kernels.table(rows)[2] == "| gemm_kernel_of_mine | 1.00 | 10.00 | 50.0% |"


PAGE = """# Figures

    accessory bench 8x7b --what decode

old

<!-- end of accessory bench -->

By hand.

    accessory bench 8x7b --what decode --layers 2

older

<!-- end of accessory bench -->
"""


def test_a_section_is_replaced_in_place_and_nothing_else():
    found = pages.with_section(PAGE, "accessory bench 8x7b --what decode", ["new"])
    assert found == PAGE.replace("\nold\n", "\nnew\n")
    assert pages.with_section(found, "accessory bench 8x7b --what decode", ["new"]) == found
    added = pages.with_section(PAGE, "accessory bench tiny --what layer", ["new"])
    assert added.startswith(PAGE)
    assert added.endswith("\n    accessory bench tiny --what layer\n\nnew\n\n<!-- end of accessory bench -->\n")


@pytest.mark.parametrize("launcher", ["", "torchrun --nproc-per-node 2 -m "])
def test_a_section_without_its_end_is_left_alone(launcher):
    page = PAGE.replace("old\n\n<!-- end of accessory bench -->", "old")
    page = page.replace("accessory bench 8x7b --what decode --layers", f"{launcher}accessory bench 8x7b --layers")
    with pytest.raises(InputError, match="has no line '<!-- end of accessory bench -->'"):
        pages.with_section(page, "accessory bench 8x7b --what decode", ["new"])


def test_a_log_grows_by_a_line(tmp_path):
    log = tmp_path / "log.md"
    for n in (1, 2):
        pages.append_line(log, f"0.{n}", "a card", "accessory bench tiny", "1 | 2", "" if n == 1 else "less")
    head, rule, *rows = log.read_text(encoding="utf-8").split("\n\n")[2].splitlines()
    assert head.count("|") == rule.count("|") == rows[0].count("|") == rows[1].count("|") == 7
    assert rows[0].startswith("| 0.1 | ")
    assert rows[0].endswith(" | a card | `accessory bench tiny` | 1 / 2 | – |")
    assert rows[1].endswith(" | less |")


def test_points_of_the_roofline_are_operations_a_byte_and_a_second():
    assert roofline.points([*PEERS, OURS]) == {OURS.who: [(0.5, 1e9 / 3e-3, "w")]}


def test_a_roofline_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    roofline.write_plot(tmp_path / "x.png", "a run", CARD, [*PEERS, OURS])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_a_roofline_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"--plot: it needs matplotlib: pip install 'mixtral-accessory\[bench\]'"
    ):
        roofline.require_matplotlib()
