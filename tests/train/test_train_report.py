"""`report.html`: its numbers are the run's, it needs no network, and in a browser nothing lies over anything else."""

from __future__ import annotations

import io
import itertools
import json
import math
import re

import numpy as np
import pytest
import yaml
from helpers import browser as web
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.cli import main
from accessory.errors import InputError
from accessory.train.metrics import METRICS_FILE, MetricsLog
from accessory.train.report import smoothed, write_report
from accessory.train.report_shares import LayerBins, png, shade
from accessory.train.report_svg import Line, chart, labels, round_numbers

needs_browser = pytest.mark.skipif(web.missing() is not None, reason=str(web.missing()))
CONFIG = {
    "llama_type": "mixtral_sparse",
    "lr": 2e-5,
    "pretrained_path": ["base", "adapter"],
    "template": None,
    "output_dir": "out/<script>alert('no')</script>&amp;",
}


def records(steps: int, layers: int, experts: int, evals: int = 0, first: int = 1):
    random = np.random.default_rng(0)
    for step in range(first, first + steps):
        done = step / (first + steps)
        share = random.dirichlet(np.full(experts, 40.0), layers)
        yield {
            "kind": "train",
            "step": step,
            "epoch": done,
            "samples": 8 * step,
            "tokens": 1000 * step,
            "loss": 1 + math.exp(-4 * done) + 0.05 * random.normal(),
            "balance": float(experts * (share**2).sum(1).mean()),
            "z": 5 - done,
            "lr": 2e-5 * (1 - done),
            "grad_norm": float(random.lognormal()),
            "tokens_per_s": 1000 / 0.5,
            "step_s": 0.5,
            "memory_gb": 23.4,
            "layers": {
                "balance": (experts * (share**2).sum(1)).tolist(),
                "entropy": (-(share * np.log(share)).sum(1)).tolist(),
                "largest": share.max(1).tolist(),
                "share": share.tolist(),
            },
        }
        if evals and (step - first + 1) % (steps // evals) == 0:
            yield {"kind": "eval", "step": step, "loss": 1.1 + math.exp(-4 * done), "tokens": 99}


def written(folder, items, config=CONFIG):
    with MetricsLog(folder) as log:
        for record in items:
            log.write(record)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


# --------------------------------------------------------------------------- pieces


@given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_bins_are_few_and_forget_nothing(steps, half, seed):
    values = np.random.default_rng(seed).normal(size=(steps, 2, 3))
    bins = LayerBins(2 * half)
    for step, value in enumerate(values, start=1):
        bins.add(step, value)
    bins.add(steps + 1, np.zeros((5, 5)))  # of another network
    width = bins.width
    assert len(bins) <= 2 * half
    assert len(bins) == math.ceil(steps / width)
    chunks = [values[n : n + width] for n in range(0, steps, width)]
    np.testing.assert_allclose(bins.means(), [chunk.mean(0) for chunk in chunks], atol=1e-12)
    assert bins.steps().tolist() == list(range(1, steps + 1, width))


def test_a_strip_is_a_png_with_the_right_colours():
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install pillow")
    share = np.array([[1 / 4, 1 / 2, 1 / 8], [1.0, 1 / 16, np.nan]])
    opened = image.open(io.BytesIO(png(shade(share, 4)))).convert("RGBA")
    seen = [[opened.getpixel((x, y)) for x in range(3)] for y in range(2)]
    assert opened.size == (3, 2)
    assert seen[0][0][3] == 0  # fair: nothing
    (r, _, b, alpha) = seen[0][1]
    assert r > b  # more: orange
    assert 100 < alpha < seen[1][0][3]  # and the more, the stronger
    (r, _, b, alpha) = seen[0][2]
    assert b > r
    assert 100 < alpha < seen[1][1][3]
    assert seen[1][2] == (128, 128, 128, 110)


def test_smoothing_keeps_lines_and_passes_over_gaps():
    line = np.linspace(3.0, 1.0, 600)
    np.testing.assert_allclose(smoothed(line)[:-10], line[:-10], atol=1e-12)
    noisy = line + np.random.default_rng(0).normal(size=600)
    assert np.abs(smoothed(noisy) - line)[30:-10].max() < 1
    noisy[100:105] = np.nan
    assert np.isfinite(smoothed(noisy)).all()
    noisy[200:300] = np.nan
    assert np.isnan(smoothed(noisy)[250])
    assert smoothed(noisy)[0] == noisy[0]
    np.testing.assert_array_equal(smoothed(noisy[:20]), noisy[:20])


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
@settings(max_examples=200, deadline=None)
def test_ticks_are_round_few_and_told_apart(low, size):
    high = low + size
    if high - low < 1e-9 * abs(low) + 1e-12:
        return
    ticks = round_numbers(low, high, 5)
    assert 1 <= len(ticks) <= 12
    assert all(low - 1e-6 * size <= tick <= high + 1e-6 * size for tick in ticks)
    gap = (high - low) / 5
    step = ticks[1] - ticks[0] if len(ticks) > 1 else None
    if step:
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-3
        assert gap * 0.99 <= step <= 2.6 * gap
    if abs(low) < 50 * size:
        assert len(set(labels(ticks))) == len(ticks)


def test_labels_have_the_digits_they_need():
    assert labels([0.0, 0.5, 1.0]) == ["0", "0.5", "1.0"]
    assert labels([1_200_000, 1_205_000]) == ["1200k", "1205k"]
    assert labels([0.0, 1e-5, 2e-5]) == ["0", "1e-5", "2e-5"]
    assert labels([-0.2, 0.0]) == ["−0.2", "0"]
    assert labels([0, 20000, 40000]) == ["0", "20k", "40k"]
    assert labels([10, 20]) == ["10", "20"]


def points(figure: str, look: str) -> list[tuple[float, float]]:
    (path,) = re.findall(rf'class="line {look}" d="([^"]*)"', figure)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


@pytest.mark.parametrize("log", [False, True])
def test_what_is_drawn_is_what_was_measured(log):
    """Read back off the picture, by its own tick labels."""
    steps = np.arange(1, 41, dtype=float)
    values = 0.5 + np.random.default_rng(1).uniform(size=40)
    values[7] = np.nan
    values[20] = 120.0 if log else 2.0
    figure = chart("Loss", [Line("training", steps, values)])
    assert ("(logarithmic)" in figure) == log
    seen = points(figure, "main")
    ups = re.findall(r'class="tick" x="46" y="([\d.]+)"[^>]*>([^<]+)<', figure)
    along = re.findall(r'class="tick" x="([\d.]+)" y="210"[^>]*>(\d+)<', figure)
    scale = np.log10 if log else np.asarray
    to_value = np.polyfit([float(y) for y, _ in ups], scale([float(text) for _, text in ups]), 1)
    to_step = np.polyfit([float(x) for x, _ in along], [float(text) for _, text in along], 1)
    shown = np.isfinite(values)
    np.testing.assert_allclose(np.polyval(to_step, [x for x, _ in seen]), steps[shown], atol=0.02)
    np.testing.assert_allclose(np.polyval(to_value, [y for _, y in seen]), scale(values[shown]), atol=0.01)
    assert (
        figure.count("M", figure.index('class="line main"'), figure.index("/>", figure.index('class="line main"'))) == 2
    )


def test_a_long_line_keeps_its_extremes():
    values = np.random.default_rng(1).uniform(size=100_000)
    values[77_777], values[3] = 3.0, -2.0
    figure = chart("x", [Line("each step", np.arange(100_000.0), values, "raw")])
    seen = points(figure, "raw")
    assert len(seen) <= 800
    heights = sorted(y for _, y in seen)
    assert heights[1] - heights[0] > 40  # the spike stands alone, and so does the dip
    assert heights[-1] - heights[-2] > 40


# --------------------------------------------------------------------------- the page


def test_the_summary_is_the_runs(tmp_path):
    items = list(records(120, 2, 4, evals=3))
    page = write_report(written(tmp_path / "my-run", items)).read_text()
    losses = [r["loss"] for r in items if r["kind"] == "train"]
    held = [r["loss"] for r in items if r["kind"] == "eval"]
    best = int(np.argmin(losses))
    for text in (
        "<h1>Finetuning my-run</h1>",
        "Steps 1 to 120 · 2 layers of 4 experts",
        f"{losses[0]:.3f} → {losses[-1]:.3f}",
        f"lowest {losses[best]:.4f} at step {best + 1}",
        f"{held[0]:.3f} → {held[-1]:.3f}",
        "960 samples",
        "1:00",  # 120 steps of half a second
        "120k",
        "2k tokens/s",
        "23.4 GB",
        "[&quot;base&quot;, &quot;adapter&quot;]",
    ):
        assert text in page, text
    last = np.mean([r["layers"]["share"] for r in items if r["kind"] == "train"][-50:], axis=0)
    cells = re.findall(r"<td style=[^>]*>([\d.]+)%</td>", page)
    np.testing.assert_allclose(np.array(cells, float).reshape(2, 4) / 100, last, atol=5.1e-4)


def test_an_idle_expert_is_named(tmp_path):
    items = list(records(60, 3, 4))
    for record in items:
        record["layers"]["share"][1] = [0.5, 0.499, 0.0, 0.001]
    page = write_report(written(tmp_path, items)).read_text()
    assert "expert 2 of layer 1, 3 of layer 1." in page


def test_text_is_escaped_and_given_words_win(tmp_path):
    folder = written(tmp_path / "<i>run", records(2, 1, 2))
    page = write_report(folder).read_text()
    assert "<script" not in page
    assert "<i>" not in page
    page = write_report(folder, 'A <b> & a "quote"', {"only": "<this>"}).read_text()
    assert "<title>A &lt;b&gt; &amp; a &quot;quote&quot;</title>" in page
    assert "&lt;this&gt;" in page
    assert "mixtral_sparse" not in page
    assert not list(folder.glob("*.partial"))


def test_odd_runs_have_a_report(tmp_path):
    for name, items in {
        "before": [{"kind": "eval", "step": 0, "loss": 2.0, "tokens": 5}, *records(1, 2, 4, evals=1)],
        "nan": [{**r, "loss": math.nan, "grad_norm": math.inf} for r in records(3, 2, 4)],
        "bare": [{"kind": "train", "step": 5, "loss": 1.0}, {"kind": "train", "step": 6, "loss": 1.0}],
        "zero": [{**r, "lr": 0.0, "loss": 0.0, "z": 0.0} for r in records(5, 1, 1, evals=5)],
        "other": [*records(3, 2, 4), *records(3, 4, 8, first=4)],
        "other key": [{**r, "new": [1], "kind": kind} for r in records(2, 1, 2) for kind in ("train", "note")],
    }.items():
        assert "<svg" in write_report(written(tmp_path / name, items)).read_text(), name
    assert "3 steps without a finite loss" in (tmp_path / "nan" / "report.html").read_text()


def test_a_run_without_steps_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match=r"metrics\.jsonl: missing"):
        write_report(tmp_path)
    written(tmp_path, [])
    with pytest.raises(InputError, match="has no training step yet"):
        write_report(tmp_path)
    written(tmp_path, records(1, 1, 2))
    (tmp_path / "config.yaml").write_text("lr: [1")
    with pytest.raises(InputError, match=r"config\.yaml: is not YAML \(.*\); mend or remove it"):
        write_report(tmp_path)
    written(tmp_path, [])
    assert main(["report", str(tmp_path)]) == 1
    assert re.fullmatch(r"accessory: error: [^\n]+ no training step yet[^\n]+\n", capsys.readouterr().err)


def test_the_command_reports_a_run_that_was_killed(tmp_path, capsys):
    written(tmp_path, records(5, 2, 4))
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'{"kind":"train","step":6,"los')
    assert main(["report", str(tmp_path), "--title", "Cut short"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    page = (tmp_path / "report.html").read_text()
    assert "Steps 1 to 5" in page
    assert "mixtral_sparse" in page


@pytest.mark.slow
def test_a_hundred_thousand_steps_of_a_large_model(tmp_path):
    (record,) = records(1, 32, 8)
    with (tmp_path / METRICS_FILE).open("w") as file:
        for step in range(1, 100_001):
            record.update(step=step, loss=2 + math.sin(step) / (1 + step / 1000), grad_norm=1 + math.cos(step * step))
            file.write(json.dumps(record) + "\n")
    assert write_report(tmp_path).stat().st_size < 3e6


# --------------------------------------------------------------------------- in a browser

# Pairs of visible texts of one picture that lie over each other, and texts that leave their picture.
OVERLAPS = """
() => [...document.querySelectorAll("svg")].flatMap(svg => {
    const texts = [...svg.querySelectorAll(":scope > text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    const all = svg.getBoundingClientRect(), found = [];
    texts.forEach(([name, a], i) => {
        const beside = a.left < all.left - 3 || a.right > all.right + 3;
        if (a.width && (beside || a.bottom > all.bottom + 3 || a.top < all.top - 3))
            found.push([svg.ariaLabel, name, "outside"]);
        for (const [other, b] of texts.slice(i + 1))
            if (a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom)
                found.push([svg.ariaLabel, name, other]);
    });
    return found;
})
"""


@pytest.fixture(scope="module")
def browser():
    with web.chromium() as opened:
        yield opened


@pytest.fixture
def opened(browser):
    """Opens a report; at the end, nothing was asked of a network and nothing complained."""
    contexts, complaints, fetched = [], [], []

    def open_report(path, **how):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **how}))
        page = contexts[-1].new_page()
        page.set_default_timeout(web.WAIT * 1000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert complaints == []
    assert fetched
    assert [url for url in fetched if not url.startswith(("file:", "data:"))] == []


@needs_browser
def test_it_is_read_without_a_network(tmp_path, opened):
    path = write_report(written(tmp_path / "run", records(300, 32, 8, evals=10)))
    assert path.stat().st_size < 1e6
    page = opened(path, java_script_enabled=True, offline=True)
    assert page.title() == "Finetuning run"
    assert page.get_by_text("Held-out loss", exact=True).is_visible()
    for heading in (
        "Loss",
        "Learning rate",
        "Load balance",
        "Router entropy",
        "Throughput",
        "Expert shares at the end",
    ):
        assert page.locator(":is(h2, h3):visible", has_text=re.compile(f"^{heading}")).count() == 1, heading
    assert page.locator("image").count() == 32
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)")
    assert not page.get_by_text("output_dir").is_visible()
    page.click("summary")
    assert page.get_by_text("output_dir").is_visible()
    assert page.get_by_text(CONFIG["output_dir"], exact=True).is_visible()
    assert page.locator("script").count() == 0
    unnamed = "[...document.querySelectorAll('svg[role=img]')].filter(s => !s.ariaLabel).length"
    assert page.evaluate(unnamed) == 0


@needs_browser
@pytest.mark.parametrize(("steps", "layers", "experts"), [(1, 1, 2), (2, 3, 8), (47, 12, 8), (1000, 32, 8)])
def test_nothing_lies_over_anything_else(tmp_path, opened, steps, layers, experts):
    path = write_report(written(tmp_path, records(steps, layers, experts, evals=min(steps, 5), first=1)))
    for width in (1280, 700, 390):
        page = opened(path, viewport={"width": width, "height": 900})
        assert page.evaluate(OVERLAPS) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        tiles = "[...document.querySelectorAll('.tile')].filter(t => t.scrollWidth > t.clientWidth).length"
        assert page.evaluate(tiles) == 0


@needs_browser
def test_light_and_dark_have_contrast(tmp_path, opened):
    path = write_report(written(tmp_path, records(30, 2, 4)))
    for scheme in ("light", "dark"):
        page = opened(path, color_scheme=scheme)
        # relative luminance of WCAG 2.2 of texts and of what they stand on
        colours = page.evaluate(
            """() => ['.tick', '.tile dt', 'h1', '.legend', 'td'].map(selector => {
                const style = getComputedStyle(document.querySelector(selector));
                const ground = getComputedStyle(document.querySelector('.chart')).backgroundColor;
                return [selector === '.tick' ? style.fill : style.color, ground];
            })"""
        )
        for text, ground in colours:
            lights = sorted(luminance(colour) for colour in (text, ground))
            assert (lights[1] + 0.05) / (lights[0] + 0.05) > 4.5, (scheme, text, ground)
    assert len(set(itertools.chain(*colours))) > 2


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
