"""`report.html` in a browser: it needs no network, draws what was measured, and no texts overlap."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re

import numpy as np
import pytest
from helpers import browser as web
from helpers.reports import CONFIG, records, written

from accessory.train.report.write import write_report

pytestmark = pytest.mark.skipif(web.missing() is not None, reason=str(web.missing()))

DRAWN = "window.Bokeh?.documents[0]?.is_idle"

# Bokeh draws in shadow roots. It also draws every text a second time, as an invisible outline. `pictures` are the
# charts: `parts` are all elements of a chart, and `texts` are its visible texts.
PICTURES = """
    const inside = node =>
        [...node.querySelectorAll("*")].flatMap(e => e.shadowRoot ? [e, ...inside(e.shadowRoot)] : [e]);
    const pictures = [...document.querySelectorAll(".picture")].map(picture => ({
        name: picture.closest("figure")?.querySelector("h3").firstChild.textContent.trim() ?? "Shares",
        box: picture.getBoundingClientRect(),
        parts: inside(picture),
        texts: inside(picture).filter(e => e.tagName === "text" && e.getAttribute("fill") !== "none"),
    }));
"""

# Pairs of visible texts of one chart that overlap, and texts that reach outside their chart.
OVERLAPS = f"""() => {{ {PICTURES}
    return pictures.flatMap(({{name, box, texts}}) => {{
        const boxes = texts.map(t => [t.textContent, t.getBoundingClientRect()]), found = [];
        boxes.forEach(([text, a], i) => {{
            if (a.left < box.left - 3 || a.right > box.right + 3 || a.bottom > box.bottom + 3 || a.top < box.top - 3)
                found.push([name, text, "outside"]);
            for (const [other, b] of boxes.slice(i + 1))
                if (a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom)
                    found.push([name, text, other]);
        }});
        return found;
    }});
}}"""

# Reads the chart of this name: its texts with the centres of their boxes, and the points of its lines.
READ = f"""wanted => {{ {PICTURES}
    const {{box, parts, texts}} = pictures.find(({{name}}) => name === wanted);
    const labels = texts.map(t => {{
        const b = t.getBoundingClientRect(), text = t.textContent.replace(/,/g, "").replace("\u2212", "-");
        return [text, (b.left + b.right) / 2, (b.top + b.bottom) / 2];
    }});
    const lines = parts.filter(e => e.tagName === "path" && e.getAttribute("stroke") === "#3380f0").map(path => {{
        const matrix = path.getScreenCTM();
        return [path.getAttribute("stroke-width"), path.getAttribute("d").match(/[ML][^ML]*/g).map(step => {{
            const [x, y] = step.slice(1).trim().split(/[ ,]+/).map(Number);
            const point = new DOMPoint(x, y).matrixTransform(matrix);
            return [step[0], point.x, point.y];
        }})];
    }});
    return {{labels, lines, left: box.left, bottom: box.bottom}};
}}"""


@pytest.fixture(scope="module")
def browser():
    with web.chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of an ordinary run."""
    return write_report(written(tmp_path_factory.mktemp("reports") / "run", records(300, 32, 8, evals=10)))


@pytest.fixture
def opened(browser):
    """Opens a report. Afterwards it checks that no page used the network or logged an error."""
    contexts, complaints, fetched = [], [], []

    def complain(message):
        if "setting log level" not in message.text:  # Bokeh's greeting
            complaints.append(message.text)

    def open_report(path, **how):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "offline": True, **how}))
        page = contexts[-1].new_page()
        page.set_default_timeout(web.WAIT * 1000)
        page.on("console", complain)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_function(DRAWN)
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert complaints == []
    assert fetched
    assert [url for url in fetched if not url.startswith(("file:", "data:"))] == []


def read(page, chart: str) -> dict:
    """The points of the chart's lines, and its numeric labels as (number, position): `along` x, `up` y."""
    seen = page.evaluate(READ, chart)
    numbers = [(float(t), x, y) for t, x, y in seen["labels"] if re.fullmatch(r"-?[\d.]+", t)]
    below = max(y for _, _, y in numbers)
    seen["along"] = [(t, x) for t, x, y in numbers if abs(y - below) < 2]
    seen["up"] = [(t, y) for t, x, y in numbers if abs(y - below) >= 2]
    return seen


def hover(page, chart: str, across: float) -> dict[str, str]:
    """The tooltip's labels and values when the pointer is over this chart, at this fraction of its width."""
    picture = page.locator(f"figure:has(h3:text-is('{chart}')) .picture, figure:has(h3:has-text('{chart} ')) .picture")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    for extra in (0, 1):  # the tooltip appears when the pointer moves
        page.mouse.move(box["x"] + across * box["width"] + extra, box["y"] + box["height"] / 2)
    tip = page.locator(".bk-Tooltip:visible")
    tip.wait_for()
    words = tip.locator("span").all_inner_texts()
    return dict(zip(words[::2], words[1::2], strict=True))


def test_it_is_read_without_a_network(report, opened):
    assert report.stat().st_size < 2e6
    page = opened(report)
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
    assert page.locator("svg image").count() == 32 * 8
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)")
    assert not page.get_by_text("output_dir").is_visible()
    page.click("summary")
    assert page.get_by_text("output_dir").is_visible()
    assert page.get_by_text(CONFIG["output_dir"], exact=True).is_visible()
    assert page.locator("script[src], link, iframe").count() == 0
    assert page.evaluate("document.querySelectorAll('.picture:not([role=img][aria-label])').length") == 0
    policy = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert policy.startswith("default-src 'none';")  # the browser would refuse to fetch any address
    assert "http" not in policy


@pytest.mark.parametrize("log", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_is_drawn_is_what_was_measured(tmp_path, opened, log):
    """Reads the values from the drawn lines, by means of the tick labels."""
    items = list(records(40, 2, 4))
    values = 0.5 + np.random.default_rng(1).uniform(size=40)
    values[7] = np.nan
    values[20] = 120.0 if log else 2.0
    for record, value in zip(items, values, strict=True):
        record["loss"] = float(value)
    page = opened(write_report(written(tmp_path, items)))
    assert ("(logarithmic)" in page.locator("figure", has_text="Loss").first.inner_text()) == log
    seen = read(page, "Loss")
    (line,) = [points for width, points in seen["lines"] if width == "1.8"]
    scale = np.log10 if log else np.asarray
    to_value = np.polyfit([y for _, y in seen["up"]], scale([value for value, _ in seen["up"]]), 1)
    to_step = np.polyfit([x for _, x in seen["along"]], [step for step, _ in seen["along"]], 1)
    shown = np.isfinite(values)
    np.testing.assert_allclose(np.polyval(to_step, [x for _, x, _ in line]), np.arange(1, 41)[shown], atol=0.1)
    np.testing.assert_allclose(np.polyval(to_value, [y for _, _, y in line]), scale(values[shown]), atol=0.02)
    assert [start for start, _, _ in line].count("M") == 2  # the gap
    assert page.get_by_text("no finite loss").is_visible()


@pytest.mark.slow
def test_ticks_are_few_told_apart_and_in_the_right_places(tmp_path, opened):
    items = list(records(70, 2, 4))
    for record in items:
        record["grad_norm"] = 1.2345 + 1e-5 * record["step"]
        record["tokens_per_s"] = 18_000.0 + 10 * record["step"]
        record["z"] = -0.2 + record["step"] / 500
    page = opened(write_report(written(tmp_path, items)))
    for chart in ("Loss", "Learning rate", "Gradient norm", "Load balance", "Router entropy", "Router z", "Memory"):
        up = read(page, chart)["up"]
        assert 2 <= len(up) <= 12, chart
        assert len({value for value, _ in up}) == len(up), chart
        values, places = np.array(up).T
        np.testing.assert_allclose(np.polyval(np.polyfit(values, places, 1), values), places, atol=1.0, err_msg=chart)
        assert (values[places.argmin()], values[places.argmax()]) == (values.max(), values.min()), chart
    assert page.locator("h3", has_text="Learning rate").inner_text() == "Learning rate × 1e-5"
    assert {"5k", "10k", "15k"} <= {text for text, *_ in page.evaluate(READ, "Throughput")["labels"]}


def test_the_heat_map_has_the_right_colours(tmp_path, opened):
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install pillow")
    items = list(records(3, 1, 4))
    for record, share in zip(
        items, ([1 / 4, 1 / 2, 1 / 8, 1 / 8], [1.0, 1 / 16, 0, 0], [math.nan, 1, 0, 0]), strict=True
    ):
        record["layers"]["share"] = [share]
    page = opened(write_report(written(tmp_path, items)))
    found = page.locator("svg image").evaluate_all(
        "all => all.map(i => i.getAttribute('xlink:href') ?? i.href.baseVal)"
    )
    rows = [image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA") for url in found]
    assert len(rows) == 4

    def cell(expert, step):
        row = rows[expert]
        return row.getpixel((int((step - 0.5) / 3 * row.width), row.height // 2))

    fair, full, missing = (cell(0, step) for step in (1, 2, 3))
    assert fair[3] < 10  # almost transparent
    assert full[0] > full[2]  # more than fair: orange
    assert missing == (128, 128, 128, 110)
    more, less = cell(1, 1), cell(2, 1)
    assert more[0] > more[2]
    assert 100 < more[3] < full[3]  # larger shares are more opaque
    assert less[2] > less[0]
    assert 100 < less[3] < cell(2, 2)[3]


@pytest.mark.slow
def test_odd_runs_have_a_report(tmp_path, opened):
    for name, items in {
        "before": [{"kind": "eval", "step": 0, "loss": 2.0, "tokens": 5}, *records(1, 2, 4, evals=1)],
        "nan": [{**r, "loss": math.nan, "grad_norm": math.inf} for r in records(3, 2, 4)],
        "bare": [{"kind": "train", "step": 5, "loss": 1.0}, {"kind": "train", "step": 6, "loss": 1.0}],
        "zero": [{**r, "lr": 0.0, "loss": 0.0, "z": 0.0} for r in records(5, 1, 1, evals=5)],
        "other": [*records(3, 2, 4), *records(3, 4, 8, first=4)],
        "other key": [{**r, "new": [1], "kind": kind} for r in records(2, 1, 2) for kind in ("train", "note")],
    }.items():
        path = write_report(written(tmp_path / name, items))
        assert path.read_text().count("data-root-id=") >= 1, name
        if name in ("nan", "bare"):
            page = opened(path)
            assert page.locator(".picture svg").count() >= 1, name
            assert page.evaluate(OVERLAPS) == [], name
        if name == "nan":
            assert page.get_by_text("3 steps without a finite loss").is_visible()


@pytest.mark.parametrize(
    ("steps", "layers", "experts"),
    [
        pytest.param(1, 1, 2, marks=pytest.mark.slow),
        pytest.param(2, 3, 8, marks=pytest.mark.slow),
        (47, 12, 8),
        pytest.param(1000, 32, 8, marks=pytest.mark.slow),
    ],
)
def test_nothing_lies_over_anything_else(tmp_path, opened, steps, layers, experts):
    path = write_report(written(tmp_path, records(steps, layers, experts, evals=min(steps, 5), first=1)))
    page = opened(path)
    for width in (1280, 700, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        page.wait_for_function(DRAWN)
        assert page.evaluate(OVERLAPS) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        tiles = "[...document.querySelectorAll('.tile')].filter(t => t.scrollWidth > t.clientWidth).length"
        assert page.evaluate(tiles) == 0


@pytest.mark.slow
def test_the_pointer_says_what_was_measured(tmp_path, opened):
    items = list(records(200, 3, 4, evals=4))
    items[60]["loss"] = math.nan
    train = {r["step"]: r for r in items if r["kind"] == "train"}
    held = {r["step"]: r["loss"] for r in items if r["kind"] == "eval"}
    page = opened(write_report(written(tmp_path, items)))
    said = hover(page, "Loss", 0.6)
    step = int(said["step"])
    assert 100 < step < 140
    assert float(said["each step"]) == pytest.approx(train[step]["loss"], rel=1e-4)
    last = max(at for at in held if at <= step)
    assert said["held out"] == f"{held[last]:.5g} at step {last}"
    said = hover(page, "Load balance", 0.6)
    low, high = map(float, said["range of layers"].split(" to "))
    assert low <= float(said["each step"]) <= high
    said = hover(page, "Learning rate", 0.3)
    assert float(said["Learning rate"]) == pytest.approx(train[int(said["step"])]["lr"] * 1e5, rel=1e-4)
    picture = page.locator(".sheet .picture").first
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    for extra in (0, 1):
        page.mouse.move(box["x"] + 0.5 * box["width"] + extra, box["y"] + 20)
    tip = page.locator(".bk-Tooltip:visible", has_text="expert")
    tip.wait_for()
    words = tip.locator("span").all_inner_texts()
    layer, expert, step, share = words[1::2]
    assert share == f"{train[int(step)]['layers']['share'][int(layer)][int(expert)]:.1%}"


@pytest.mark.slow
def test_a_dragged_mouse_zooms_all_charts_and_a_finger_none(report, opened):
    ranges = "Bokeh.documents[0].roots().map(({x_range}) => [x_range.start, x_range.end])"
    zoomed = "() => Bokeh.documents[0].roots()[0].x_range.end < 250"

    def drag(page):
        box = page.locator(".picture").first.bounding_box()
        page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 100)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 105, steps=3)
        page.mouse.up()

    page = opened(report)
    whole = page.evaluate(ranges)
    assert whole[0][0] < 1
    assert whole[0][1] > 300
    drag(page)
    page.wait_for_function(zoomed)
    near = page.evaluate(ranges)
    assert all(each == near[0] for each in near)
    assert near[0][1] - near[0][0] < 300 / 4
    far = f"chart => ({READ})(chart).labels.some(([text]) => Number(text) > 250)"
    for chart in ("Loss", "Router z"):  # and drawn so
        page.wait_for_function(f"chart => !({far})(chart)", arg=chart)
    page.locator(".picture").first.dblclick(position={"x": 500, "y": 100})
    page.wait_for_function(f"() => !({zoomed})()")
    assert page.evaluate(ranges) == whole
    phone = opened(report, is_mobile=True, has_touch=True, viewport={"width": 390, "height": 800})
    phone.wait_for_timeout(200)
    drag(phone)
    phone.wait_for_timeout(500)
    assert phone.evaluate(ranges) == whole


@pytest.mark.slow
def test_light_and_dark_have_contrast(report, opened):
    page = opened(report, color_scheme="light")
    for scheme in ("light", "dark"):  # the page follows when the scheme changes
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        # WCAG 2.2's relative luminance of texts and of their backgrounds
        colours = page.evaluate(
            f"""() => {{ {PICTURES}
                const ground = getComputedStyle(document.querySelector('.chart')).backgroundColor;
                const ticks = pictures.map(({{texts}}) => getComputedStyle(texts[0]).fill);
                return ['.tile dt', 'h1', '.legend', 'td', '.levels'].map(
                    selector => getComputedStyle(document.querySelector(selector)).color
                ).concat(ticks).map(colour => [colour, ground]);
            }}"""
        )
        for text, ground in colours:
            lights = sorted(luminance(colour) for colour in (text, ground))
            assert (lights[1] + 0.05) / (lights[0] + 0.05) > 4.5, (scheme, text, ground)
    assert len(set(itertools.chain(*colours))) > 2


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
