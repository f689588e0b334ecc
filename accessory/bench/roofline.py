"""The plot of `accessory bench --plot`: a roofline, operations a second over operations a byte. matplotlib draws."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

from accessory.bench.card import Card
from accessory.bench.figures import Figure
from accessory.errors import MissingExtraError
from accessory.train.metrics import write_whole

MARKS = "osD^vP*X"


def require_matplotlib() -> None:
    """MissingExtraError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("--plot: it needs matplotlib: pip install 'mixtral-accessory[bench]'")


def points(figures: Sequence[Figure]) -> dict[str, list[tuple[float, float, str]]]:
    """By who did it: (operations a byte, operations a second, what), of the figures of which both are known."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for f in figures:
        if f.seconds and f.nbytes and f.operations:
            found.setdefault(f.who, []).append((f.operations / f.nbytes, f.operations / f.seconds, f.what))
    return found


def write_plot(path: Path, title: str, card: Card, figures: Sequence[Figure]) -> None:
    """The file, whole: a PNG."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(9, 6), layout="constrained")
    axes = canvas.subplots()
    ridge = card.matmul / card.copy  # operations a byte from which the products are the limit
    series = points(figures)
    all_x = [x for some in series.values() for x, _, _ in some] or [ridge]
    ends = (min([*all_x, ridge]) / 3, max([*all_x, ridge]) * 3)
    roof = [(x, min(x * card.copy, card.matmul) / 1e12) for x in (ends[0], ridge, ends[1])]
    axes.plot(*zip(*roof, strict=True), color="black", linewidth=1.5, label="the card's rates")
    for n, (who, some) in enumerate(series.items()):
        x, y, names = zip(*some, strict=True)
        axes.plot(x, [value / 1e12 for value in y], MARKS[n % len(MARKS)], label=who)
        for place, value, name in zip(x, y, names, strict=True):
            axes.annotate(
                name.rpartition(", ")[2], (place, value / 1e12), fontsize=6, xytext=(3, 3), textcoords="offset points"
            )
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s")
    axes.set_title(f"{title}\n{card}", fontsize=8)
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize=7)
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=130)
    with write_whole(path) as file:
        file.write(png.getvalue())
