"""The pages with images, in headless Chromium, with a model that answers what reached it."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers import browser as web
from helpers import pictures

from accessory.data.images import open_image
from accessory.data.system_prompt import SYSTEM_PROMPTS, format_prompt
from accessory.data.tokenizer import MIXTRAL_TOKENIZER, load_tokenizer
from accessory.demos.serving import _free_port
from accessory.errors import InputError
from accessory.server import uploads
from accessory.server.page import Page
from accessory.server.page_kinds import DIALOGUE_WITH_IMAGE, SINGLE_WITH_IMAGE

pytestmark = pytest.mark.skipif(web.missing() is not None, reason=str(web.missing()))

MAX_SEQ_LEN = 256


class Teller:
    """A stand-in model that answers with the size of the image it got, or that it got none."""

    image_words = 7

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer(MIXTRAL_TOKENIZER)
        self.prompts: list[str] = []
        self.held = threading.Event()  # while cleared, an answer stops after one word until it is cancelled
        self.held.set()

    def stream_generate(self, prompt, image=None, max_gen_len=512, cancelled=None, **how):
        if max_gen_len > MAX_SEQ_LEN:
            raise InputError(f"max_gen_len: got {max_gen_len}")
        self.how = how
        self.prompts.append(prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt))
        size = None if image is None else open_image(image).size
        text = "Nothing to see" if size is None else f"An image of {size[0]} by {size[1]} pixels"
        yield {"text": text.split()[0], "end_of_content": False}
        while not self.held.wait(0.01) and not cancelled():
            pass
        yield {"text": text if not cancelled() else text.split()[0], "end_of_content": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    pictures.write_picture(folder / "a cat.png", 64, 48)
    pictures.noise(32, 40).save(folder / "dog.jpg")
    broken = {"truncated.jpg": pictures.BROKEN_INSIDE["truncated JPEG"], "huge.png": pictures.BROKEN["huge"]}
    broken |= {"text.png": pictures.BROKEN["text"], "moving.gif": pictures.BROKEN["animated GIF"]}
    for name, (data, _) in broken.items():
        (folder / name).write_bytes(data)
    (folder / "heavy.png").write_bytes(b"\x89PNG" + bytes(21 * 2**20))
    return folder


@pytest.fixture(scope="module")
def pages():
    """Each kind of page with its own model. Starts before the browser: the event loops of both must not meet."""
    # Seconds between checks of Gradio that a visitor is still there; its default is 15.
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_HEARTBEAT_INTERVAL", "1")
    started = {}
    for name, demo in (("multi", DIALOGUE_WITH_IMAGE), ("single", SINGLE_WITH_IMAGE)):
        page = Page(demo, Teller(), "a teller", MAX_SEQ_LEN)
        started[name] = (page, page.launch("127.0.0.1", _free_port("127.0.0.1", 0), False)[0])
    yield started
    patch.undo()
    for page, _ in started.values():
        page.close()
        assert not folder_of(page).exists()


def folder_of(page: Page) -> Path:
    return Path(page._uploads._folder.name)


def kept(page: Page) -> list[str]:
    return sorted(path.name for path in folder_of(page).rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def browser(pages):
    with web.chromium() as opened:
        yield opened


@pytest.fixture
def come(pages, browser, monkeypatch):
    """Opens a window on a kind of page."""
    visitors = []

    def open_window(kind: str) -> web.Visitor:
        page, url = pages[kind]
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder_of(page)))  # in use, a process has one page
        visitors.append(web.Visitor(browser, url))
        return visitors[-1]

    yield open_window
    for visitor in visitors:
        visitor.leave()


@pytest.fixture(scope="module")
def windows(pages, browser):
    """One window on each kind of page. Tests share them, because opening one takes long."""
    opened = {kind: web.Visitor(browser, url) for kind, (_, url) in pages.items()}
    yield opened
    for visitor in opened.values():
        visitor.leave()


@pytest.fixture
def visit(windows, pages, monkeypatch):
    """The window on a kind of page, reset to the state in which it was opened."""

    def window(kind: str) -> web.Visitor:
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder_of(pages[kind][0])))  # in use, a process has one page
        windows[kind].afresh()
        windows[kind].set("max_gen_len", 128)
        return windows[kind]

    return window


@pytest.fixture
def multi(visit):
    visitor = visit("multi")
    visitor.choose("template", "default")
    return visitor


@pytest.fixture
def single(visit):
    visitor = visit("single")
    visitor.choose("system_prompt", "alpaca")
    return visitor


CAT, DOG, NONE = "An image of 64 by 48 pixels", "An image of 32 by 40 pixels", "Nothing to see"


# --------------------------------------------------------------------------- dialogues


def test_a_dialogue_is_about_its_image_from_beginning_to_end(multi, pages, files):
    teller = pages["multi"][0].model
    multi.upload(files / "a cat.png")
    multi.ask("What is it?")
    multi.ask("And now?")
    assert multi.rounds() == [("user", "What is it?"), ("bot", CAT), ("user", "And now?"), ("bot", CAT)]
    assert multi.pictures() == ["a cat.png"]
    assert teller.prompts[-1].endswith(
        f"### Human: What is it?\n### Assistant: {CAT}\n### Human: And now?\n### Assistant:"
    )
    multi.press("undo")
    multi.expect(multi.page.locator("#output [data-testid=bot]")).to_have_count(1)
    assert (multi.question(), multi.pictures()) == ("And now?", ["a cat.png"])
    multi.press("undo")
    multi.expect(multi.page.locator("#output [data-testid=bot]")).to_have_count(0)
    multi.ask("And now?")  # the image is still in its box
    assert multi.rounds()[1] == ("bot", CAT)


def test_every_way_to_draw_tokens_reaches_the_model(multi, pages):
    teller = pages["multi"][0].model
    multi.ask("Hello")
    plain = {"top_k": 0, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    stops = teller.how["additional_stop_symbols"]
    assert teller.how == {"temperature": 0, "top_p": 0.95, **plain, "seed": None, "additional_stop_symbols": stops}
    multi.page.click("#more >> text=More")
    multi.settled()
    given = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.3}
    given |= {"temperature": 0.7, "top_p": 0.8, "seed": 5}
    for field, value in given.items():
        number = multi.page.locator(f"#{field} input[type=number]").first
        number.fill(str(value))
        number.blur()
    multi.set("stop_texts", "END\n###")
    multi.ask("And now?")
    assert teller.how == {**given, "additional_stop_symbols": [*stops, "END", "###"]}


@pytest.mark.slow
def test_another_image_or_none_begins_another_dialogue_and_the_page_says_so(multi, files):
    multi.ask("Hello")
    assert (multi.rounds()[-1], multi.pictures()) == (("bot", NONE), [])
    multi.upload(files / "a cat.png")
    multi.says("The next message begins a new dialogue, about this image")
    assert multi.rounds()[-1] == ("bot", NONE)  # the old dialogue stays until then
    multi.ask("What is it?")
    assert multi.rounds() == [("user", "What is it?"), ("bot", CAT)]
    multi.drop_image()
    multi.upload(files / "dog.jpg")
    multi.says("The next message begins a new dialogue, about this image")
    multi.ask("And this?")
    assert (multi.rounds(), multi.pictures()) == ([("user", "And this?"), ("bot", DOG)], ["dog.jpg"])
    multi.drop_image()
    multi.says("The next message begins a new dialogue, without an image")
    multi.ask("And without?")
    assert (multi.rounds(), multi.pictures()) == ([("user", "And without?"), ("bot", NONE)], [])


def test_the_same_image_chosen_again_goes_on_with_its_dialogue(multi, files):
    multi.upload(files / "dog.jpg")
    multi.ask("What is it?")
    multi.drop_image()
    multi.says("The next message begins a new dialogue, without an image")
    multi.upload(files / "dog.jpg")
    multi.says("")
    multi.ask("Sure?")
    assert len(multi.rounds()) == 4


@pytest.mark.slow
def test_clear_empties_the_page_and_a_new_image_does_not_disturb_an_answer(multi, pages, files):
    teller = pages["multi"][0].model
    multi.upload(files / "a cat.png")
    teller.held.clear()
    try:
        multi.ask("What is it?", wait="Writing")
        multi.drop_image()
        multi.upload(files / "dog.jpg")
        multi.press("stop")
        multi.status("Stopped after")
    finally:
        teller.held.set()
    assert (multi.rounds(), multi.pictures()) == ([("user", "What is it?"), ("bot", "An")], ["a cat.png"])
    multi.ask("And this?")
    assert multi.rounds() == [("user", "And this?"), ("bot", DOG)]
    multi.press("clear")
    multi.expect(multi.page.locator("#output [data-testid=bot]")).to_have_count(0)
    multi.expect(multi.page.locator("#image img")).to_have_count(0)
    multi.ask("Hello?")
    assert multi.rounds() == [("user", "Hello?"), ("bot", NONE)]


def test_a_failed_answer_keeps_the_image(multi, files):
    multi.upload(files / "a cat.png")
    multi.set("max_gen_len", MAX_SEQ_LEN + 1)
    multi.ask("What is it?", wait="Not answered")
    assert f"max_gen_len: got {MAX_SEQ_LEN + 1}" in multi.complaint()
    assert multi.question() == "What is it?"
    multi.set("max_gen_len", 9)
    multi.press("send")
    multi.status("Answered in")
    assert multi.rounds()[-1] == ("bot", CAT)


def test_the_places_of_an_image_count_where_a_prompt_is_cut(multi, files):
    """The answer leaves 60 of 256 positions: enough for the 54 tokens of the prompt, but not with 7 image tokens."""
    multi.choose("template", "none")
    multi.set("max_gen_len", MAX_SEQ_LEN - 60)
    question = " ".join(["word"] * 53)  # with BOS, 54 tokens
    multi.ask(question)
    assert multi.page.locator(".toast-body").count() == 0
    multi.upload(files / "dog.jpg")
    multi.ask(question)
    assert "only 53 fit into 256" in multi.complaint()


# --------------------------------------------------------------------------- single questions


def test_each_question_has_its_image(single, pages, files):
    teller = pages["single"][0].model
    single.ask("What is it?")
    assert single.answer() == NONE
    single.upload(files / "a cat.png")
    single.ask("What is it?")
    assert single.answer() == CAT
    assert teller.prompts[-1] == format_prompt("What is it?")
    single.drop_image()
    single.upload(files / "dog.jpg")
    single.ask("And this?")
    assert single.answer() == DOG
    single.press("clear")
    single.expect(single.page.locator("#image img")).to_have_count(0)
    assert (single.answer(), single.question()) == ("", "")
    assert single.options("system_prompt") == list(SYSTEM_PROMPTS)


def test_an_image_alone_is_captioned(single, pages, files):
    teller = pages["single"][0].model
    single.ask("", wait="Nothing was asked")
    single.upload(files / "dog.jpg")
    for name in ("caption", "None"):
        single.choose("system_prompt", name)
        single.page.evaluate("window.said = []")
        single.press("send")
        single.status("Answered in")
        assert (single.answer(), teller.prompts[-1]) == (DOG, "")
    single.ask("<image>\nWhat is it?")
    assert (single.answer(), teller.prompts[-1]) == (DOG, "What is it?")


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", [pytest.param("multi", marks=pytest.mark.slow), "single"])
def test_what_is_no_image_is_one_line_that_names_it(kind, visit, pages, files):
    visitor = visit(kind)
    for name, words in (
        ("truncated.jpg", "truncated.jpg: is truncated ("),
        ("text.png", "text.png: is not an image, or of a format that is not read"),
        ("huge.png", "huge.png: has 30,000 × 30,000 pixels, more than 64,000,000; make it smaller"),
        ("moving.gif", "moving.gif: is an animated GIF; give one frame"),
        ("heavy.png", 'File(s) exceed the maximum allowed size of 20.0 Mb: "heavy.png"'),
    ):
        visitor.upload(files / name, wait=False)
        complaint = visitor.complaint().strip().splitlines()[-1]
        assert complaint.startswith(words)
        assert str(folder_of(pages[kind][0])) not in complaint
        visitor.expect(visitor.page.locator("#image img")).to_have_count(0)
        visitor.expect(visitor.page.locator(".toast-body")).to_have_count(0)
    visitor.ask("And without?")
    assert (visitor.answer() if kind == "single" else visitor.rounds()[-1][1]) == NONE
    assert kept(pages[kind][0]) == []


@pytest.mark.slow
def test_files_are_private_and_go_when_nobody_needs_them(multi, pages, browser, files, monkeypatch):
    monkeypatch.setattr(uploads, "_UNDER_WAY", 2.0)
    page, url = pages["multi"]
    assert folder_of(page).stat().st_mode & 0o077 == 0
    multi.upload(files / "a cat.png")
    multi.ask("What is it?")
    other = web.Visitor(browser, url)
    other.upload(files / "a cat.png")
    other.drop_image()
    other.upload(files / "dog.jpg")
    assert kept(page) == ["a cat.png", "dog.jpg"]  # both visitors share one file of the cat
    other.leave()
    wait_for(lambda: kept(page) == ["a cat.png"])
    multi.ask("Still there?")
    assert multi.rounds()[-1] == ("bot", CAT)
    multi.press("clear")
    wait_for(lambda: kept(page) == [])


def wait_for(condition) -> None:
    deadline = time.monotonic() + web.WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_only_what_was_uploaded_can_be_asked_about(single, pages, files):
    """A browser sends back the path of its upload. The path of another file is refused before anything opens it."""
    page, url = pages["single"]
    number = next(n for n, function in page.blocks.fns.items() if function.name == "_begin")
    wanted = {"path": str(files / "dog.jpg"), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [None, "What?", wanted], "fn_index": number, "session_hash": "stranger"}).encode()
    request = urllib.request.Request(
        f"{url}gradio_api/run/predict", body, {"Content-Type": "application/json"}, method="POST"
    )
    before = len(page.model.prompts)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code >= 400
    assert "not uploaded by a user" in refused.value.read().decode()
    assert len(page.model.prompts) == before
    assert "stranger" not in page._stops


@pytest.mark.parametrize("kind", [pytest.param("multi", marks=pytest.mark.slow), "single"])
def test_nothing_is_fetched_from_elsewhere_and_nothing_offers_to_send_an_image_away(kind, visit, pages, files):
    visitor = visit(kind)
    visitor.upload(files / "a cat.png")
    visitor.ask("What is it?")
    assert {url for url in visitor.fetched if not url.startswith((pages[kind][1], "data:", "blob:"))} == set()
    for button in visitor.page.locator("[title=Share], [title=Download]").all():
        visitor.expect(button).not_to_be_visible()
