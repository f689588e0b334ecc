"""Starts a demo as a separate process and uses it in headless Chromium. Every wait has a time limit."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psutil

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WAIT = 20.0  # seconds that a page may take to show anything
# Records every status that the page has shown since the last question: polling would miss a short one, and the last
# answer's status must not be taken for this one's.
RECORD = """
window.said = [];
let last = "";
new MutationObserver(() => {
    const text = document.querySelector("#status span.md")?.textContent.trim() ?? "";
    if (text !== last) window.said.push(last = text);
}).observe(document.body, {subtree: true, childList: true, characterData: true});
"""


def missing() -> str | None:
    """Says what is missing to use a page here; None if nothing is."""
    for name in ("gradio", "playwright"):
        if importlib.util.find_spec(name) is None:
            return f"needs {name}: pip install {name}"
    return None if CHROMIUM.exists() else f"needs {CHROMIUM}: apt-get install chromium"


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS, timeout=WAIT * 1000)
        try:
            yield browser
        finally:
            browser.close()


class Served:
    """A demo started as `command` in `folder`, once it has printed its address."""

    def __init__(self, command: Sequence[str], folder: Path, log: Path) -> None:
        self.log = log
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        self._url: str | None = None

    @property
    def url(self) -> str:
        deadline = time.monotonic() + 60
        while self._url is None:
            if found := re.search(r"(?:Open|its page at) (http://\S+/)", self.log.read_text()):
                self._url = found[1]
                break
            assert self.process.poll() is None, f"it ended: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"it did not come up: {self.log.read_text()}"
            time.sleep(0.05)
        return self._url

    def family(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def interrupt(self) -> float:
        """Sends SIGINT as Ctrl-C does (torchrun passes it on to its ranks); returns the seconds until it ended."""
        family, started = self.family(), time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)
        self.process.wait(WAIT)
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
        return time.monotonic() - started

    def kill(self) -> None:
        if self.process.poll() is None:
            family = self.family()  # torchrun's ranks are in sessions of their own
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait(WAIT)
            psutil.wait_procs(family, timeout=5)


SETTLED = """() => {
    const fetched = performance.getEntriesByType("resource").length, now = performance.now();
    if (fetched !== window.fetched) [window.fetched, window.since] = [fetched, now];
    return now - window.since > 200;
}"""


class Visitor:
    """A browser window on a demo."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        from playwright.sync_api import expect

        self.context = browser.new_context(viewport={"width": 1200, "height": 850}, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT * 1000)
        self.expect = expect
        self.fetched: list[str] = []
        self.page.on("request", lambda request: self.fetched.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#question textarea")
        self.page.evaluate(RECORD)
        self.settled()

    def settled(self) -> None:
        """Wait until the page fetches no more of itself: a part that shows may not hear what is done to it yet."""
        self.page.wait_for_function(SETTLED)

    def set(self, field: str, value: object) -> None:
        self.page.fill(f"#{field} input, #{field} textarea", str(value))

    def choose(self, field: str, option: str) -> None:
        # The event itself, not a click, because the list moves while it opens. Enter would choose nothing while the
        # page has not filtered the list.
        chooser = self.page.locator(f"#{field} input")
        chooser.click()
        self.page.get_by_role("option", name=option, exact=True).dispatch_event("mousedown", {"bubbles": True})
        self.expect(chooser).to_have_value(option)
        chooser.blur()

    def options(self, field: str) -> list[str]:
        self.page.click(f"#{field} input")
        names = [text.strip(" ✓\n") for text in self.page.get_by_role("option").all_inner_texts()]
        self.page.keyboard.press("Escape")
        return names

    def ask(self, text: str, *, wait: str | None = "Answered in") -> None:
        self.set("question", text)
        self.page.evaluate("window.said = []")
        self.press("send")
        if wait:
            self.status(wait)

    def press(self, button: str) -> None:
        self.page.click(f"button#{button}, #{button} button")

    def status(self, begins: str) -> None:
        """Wait until the page has said this since the last question."""
        said = f"window.said.some(text => text.startsWith({json.dumps(begins)}))"
        try:
            self.page.wait_for_function(said)
        except Exception as error:
            shown = self.page.evaluate("window.said")
            raise AssertionError(f"{begins!r} was not said in {WAIT:.0f} s, only {shown}") from error

    def question(self) -> str:
        return self.page.input_value("#question textarea")

    def answer(self) -> str:
        """The answer on a page of single turns."""
        return self.page.input_value("#output textarea")

    def grows(self) -> None:
        """Wait until more text has been written than now."""
        length = "(document.querySelector('#output textarea')?.value ?? "
        length += "document.querySelector('#output').textContent).length"
        self.page.wait_for_function(f"{length} > {self.page.evaluate(length)}")

    def rounds(self) -> list[tuple[str, str]]:
        """(who, text) of each message of a dialogue, the text as Markdown shows it. Images are left out."""
        shown = self.page.locator("#output [data-testid=user], #output [data-testid=bot]").all()
        said = [m for m in shown if not m.locator("img").count()]
        return [(m.get_attribute("data-testid"), (m.text_content() or "").strip()) for m in said]

    def pictures(self) -> list[str]:
        """The names of the images in a dialogue."""
        shown = self.page.locator("#output [data-testid=user] img").all()
        return [unquote(image.get_attribute("src")).rpartition("/")[2] for image in shown]

    def upload(self, path: Path, wait: bool = True) -> None:
        """Choose an image; wait until the server has it and the page shows it.

        A page that has just come up may not hear the first choice.
        """
        self.page.set_input_files("#image input[type=file]", path)
        if not wait:
            return
        from playwright.sync_api import TimeoutError as PlaywrightTimeout

        try:
            self.page.wait_for_selector("#image img[src*='/file=']", timeout=3000)
        except PlaywrightTimeout:
            self.page.set_input_files("#image input[type=file]", path)
            self.page.wait_for_selector("#image img[src*='/file=']")
        self.settled()

    def drop_image(self) -> None:
        self.page.click("#image button[title='Remove Image']")
        self.expect(self.page.locator("#image img")).to_have_count(0)

    def says(self, text: str) -> None:
        """Wait until the status is exactly this text."""
        self.expect(self.page.locator("#status")).to_have_text(re.compile(rf"^\s*{re.escape(text)}\s*$"))

    def complaint(self) -> str:
        """Closes the note that popped up and returns its text."""
        note = self.page.locator(".toast-body").first
        text = note.inner_text()
        note.locator("button").last.click()
        return text

    def afresh(self) -> None:
        """Puts the page back into the state in which it was opened."""
        self.press("clear")
        self.expect(self.page.locator("#question textarea")).to_have_value("")
        self.page.wait_for_function(
            "!document.querySelector('#output [data-testid=user]')"
            " && !document.querySelector('#output textarea')?.value && !document.querySelector('#image img')"
        )
        self.fetched.clear()

    def leave(self) -> None:
        self.context.close()


def demo_command(script: str, *options: object, ranks: int | None = None, port: int = 0) -> list[str]:
    """The command that starts `demos/<script>` as the tutorial does; with `ranks`, by torchrun on port `port`."""
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    return [*launcher, f"demos/{script}", *map(str, options)]
