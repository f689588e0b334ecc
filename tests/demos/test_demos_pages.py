"""Both demo pages, started as processes and used in headless Chromium: they show the text of `MetaModel`."""

from __future__ import annotations

import itertools
import re
import socket
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import browser as web
from helpers.random_models import write_speaking
from helpers.sizes import SPEAKING

from accessory.config import MoEArgs
from accessory.convert.convert import convert
from accessory.data.conversation import Conversation
from accessory.data.system_prompt import SYSTEM_PROMPTS, format_prompt
from accessory.model.meta import MetaModel

PACKAGE = Path(__file__).parents[2] / "accessory"
MAX_SEQ_LEN = 1024
ARGS = SPEAKING.replace(max_seq_len=MAX_SEQ_LEN, moe=MoEArgs())
LONG = 900  # tokens: an answer that takes long enough to be stopped

# The fast tests use a process for each page. Those of several ranks are slow ones.
RANKS = pytest.param("ranks", marks=pytest.mark.slow)
WRAPPED = pytest.param("wrapped", marks=pytest.mark.slow)

needs_browser = pytest.mark.skipif(web.missing() is not None, reason=str(web.missing()))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    write_speaking(root / "hf", ARGS)
    for kind in ("base", "sparse"):
        convert(root / "hf", root / kind, to=kind, shards=2, progress=False)
    return root


@pytest.fixture(scope="module")
def model(folders):
    return MetaModel.from_pretrained(folders / "hf", dtype=torch.float32, max_seq_len=MAX_SEQ_LEN, device="cpu")


class Demos(dict):
    """By name. Each starts when it is first asked for: the fast tests ask for two of them."""

    def __init__(self, folder, commands):
        self._folder, self._commands = folder, commands

    def __missing__(self, name):
        self[name] = web.Served(self._commands[name], PACKAGE, self._folder / f"{name}.log")
        return self[name]


@pytest.fixture(scope="module")
def served(folders):
    common = ["--max_seq_len", MAX_SEQ_LEN, "--dtype", "fp32"]
    commands = {
        "multi": web.demo_command("multi_turn.py", "--pretrained_path", folders / "base", *common, "--port", 0),
        "single": web.demo_command("single_turn.py", "--pretrained-path", folders / "sparse", *common, "--port", 0),
        "wrapped": web.demo_command(
            "multi_turn.py", "--n_gpus", 2, "--pretrained_path", folders / "sparse", *common, "--port", 0
        ),
        "ranks": web.demo_command(
            "single_turn.py", "--pretrained_path", folders / "base", *common, "--port", free_port(),
            ranks=2, port=free_port(),
        ),
    }  # fmt: skip
    demos = Demos(folders, commands)
    yield demos
    for demo in demos.values():
        demo.kill()


@pytest.fixture(scope="module")
def browser():
    with web.chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def come(served, browser):
    """Opens a window on a demo."""
    visitors = []

    def open_window(name: str) -> web.Visitor:
        visitors.append(web.Visitor(browser, served[name].url))
        return visitors[-1]

    yield open_window
    for visitor in visitors:
        visitor.leave()


@pytest.fixture(scope="module")
def visit(come):
    """The open window on a demo, cleared. Tests share it, because opening one takes long."""
    windows: dict[str, web.Visitor] = {}

    def window(name: str) -> web.Visitor:
        if name in windows:
            windows[name].afresh()
        return windows.setdefault(name, windows.get(name) or come(name))

    return window


@pytest.fixture
def dialogue(visit):
    visitor = visit("multi")
    visitor.set("max_gen_len", 12)
    visitor.choose("template", "default")
    visitor.set("system", "")
    return visitor


def said(model, messages, template="default", system=None, n=12):
    conversation = Conversation(template, system)
    for message in messages:
        conversation.add(*message)
    how = conversation.template
    ids = conversation.prompt_ids(model.tokenizer)
    return how.reply(model.generate([ids], max_gen_len=n, additional_stop_symbols=how.stop_strings)[0])


def letters(text):
    """Only the letters and digits: a random model writes much that Markdown would change."""
    return re.sub(r"[\W_]+", "", text)


def shown(*messages):
    return [({"user": "user", "assistant": "bot"}[who], letters(text)) for who, text in messages]


def rounds(visitor):
    return [(who, letters(text)) for who, text in visitor.rounds()]


# --------------------------------------------------------------------------- the dialogue


@needs_browser
def test_two_rounds_undo_and_clear(dialogue, model):
    first = ("user", "What is a mixture of experts?")
    dialogue.ask(first[1])
    one = [first, ("assistant", said(model, [first]))]
    assert rounds(dialogue) == shown(*one)
    assert dialogue.question() == ""
    two = [*one, ("user", "And a <router>?")]
    dialogue.ask(two[-1][1])
    two.append(("assistant", said(model, two)))
    assert rounds(dialogue) == shown(*two)
    dialogue.press("undo")
    dialogue.expect(dialogue.page.locator("#output [data-testid=bot]")).to_have_count(1)
    assert rounds(dialogue) == shown(*one)
    assert dialogue.question() == "And a <router>?"
    dialogue.press("clear")
    dialogue.expect(dialogue.page.locator("#output [data-testid=bot]")).to_have_count(0)
    dialogue.press("undo")
    dialogue.status("Nothing to take back")
    dialogue.ask("  ", wait="Nothing was asked")


@needs_browser
def test_templates_and_system_message(dialogue, model):
    assert dialogue.options("template") == ["default", "alpaca", "mistral", "chatml", "none"]  # the tokenizer has none
    question = ("user", "Why is the sky blue?")
    for template, system in (("mistral", ""), ("alpaca", "Answer in one word."), ("none", "")):
        dialogue.choose("template", template)
        dialogue.set("system", system)
        dialogue.ask(question[1])
        answer = said(model, [question], template, system or None)
        assert rounds(dialogue) == shown(question, ("assistant", answer)), template
        dialogue.afresh()


@needs_browser
@pytest.mark.slow
def test_a_dialogue_with_two_ranks(visit, model):
    visitor = visit("wrapped")
    assert visitor.page.inner_text("#model").strip() == "sparse · sparse implementation · float32 · CPU, 2 ranks"
    question = ("user", "What is a mixture of experts?")
    visitor.set("max_gen_len", 12)
    visitor.ask(question[1])
    assert rounds(visitor) == shown(question, ("assistant", said(model, [question])))
    visitor.set("max_gen_len", LONG)
    visitor.ask("Tell me all", wait="Writing")
    visitor.press("stop")
    visitor.status("Stopped after")


@needs_browser
def test_text_grows_until_stop_and_the_round_stays(dialogue, model):
    dialogue.set("max_gen_len", LONG)
    dialogue.ask("Tell me all", wait=None)
    seen = []
    deadline = time.monotonic() + web.WAIT
    while len({len(text) for text in seen}) < 4 and time.monotonic() < deadline:
        seen += [text for who, text in rounds(dialogue)[1:] if text]
        time.sleep(0.03)
    dialogue.press("stop")
    dialogue.status("Stopped after")
    (_, last) = rounds(dialogue)[1]
    assert all(b.startswith(a) for a, b in itertools.pairwise([*seen, last]))
    n, longer = 50, ""
    while len(longer) <= len(last) and n < LONG:  # mostly a tenth of the whole answer suffices
        n = min(2 * n, LONG)
        longer = letters(said(model, [("user", "Tell me all")], n=n))
    assert longer.startswith(last)
    assert last != longer
    dialogue.set("max_gen_len", 12)
    dialogue.ask("Go on")  # the next round can begin
    messages = [("user", "Tell me all"), ("assistant", last), ("user", "Go on")]
    assert rounds(dialogue)[:3] == shown(*messages)


@needs_browser
def test_html_and_code_stay_what_they_are(dialogue):
    text = "a<b && c>d <b>bold</b> &lt; `x<int>`\n```cpp\nstd::vector<T> &x;\n```\n**done**"
    dialogue.ask(text)
    seen = dialogue.page.locator("#output [data-testid=user]").inner_text()
    for part in ("a<b && c>d <b>bold</b> &lt; x<int>", "std::vector<T> &x;"):
        assert part in seen
    assert dialogue.page.locator("#output [data-testid=user] strong").inner_text() == "done"


@needs_browser
@pytest.mark.parametrize("name", ["multi", "single", RANKS])
def test_a_mistake_is_explained_and_the_next_question_answered(visit, name):
    visitor = visit(name)
    visitor.set("max_gen_len", 5000)
    visitor.ask("How long may it be?", wait="Not answered")
    assert f"max_gen_len: got 5000, but it must be a whole number from 1 to max_seq_len - 1 = {MAX_SEQ_LEN - 1}" in (
        visitor.complaint()
    )
    assert visitor.question() == "How long may it be?"
    visitor.set("max_gen_len", 4)
    visitor.press("send")
    visitor.status("Answered in")


@needs_browser
def test_a_prompt_that_is_cut_is_said_to_be(visit):
    visitor = visit("single")
    visitor.set("max_gen_len", MAX_SEQ_LEN - 20)
    visitor.ask("Too much " * 10, wait=None)
    assert "only 20 fit into" in visitor.complaint()
    visitor.press("stop")
    visitor.status("Stopped after")


@needs_browser
@pytest.mark.parametrize("name", ["multi", "single"])
def test_it_shows_its_model_and_fetches_nothing_from_elsewhere(visit, served, name):
    visitor = visit(name)
    kind = {"multi": "base", "single": "sparse"}[name]
    line = visitor.page.inner_text("#model")
    assert line.strip() == f"{kind} · {kind} implementation · float32 · CPU"
    visitor.set("max_gen_len", 4)
    visitor.ask("Who are you?")
    assert visitor.fetched
    assert {url for url in visitor.fetched if not url.startswith((served[name].url, "data:", "blob:"))} == set()


@needs_browser
@pytest.mark.parametrize("name", ["multi", "single"])
def test_only_this_machine_is_served(served, name):
    port = int(served[name].url.rsplit(":", 1)[1].strip("/"))
    process = psutil.Process(served[name].process.pid)
    listening = [c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [(a.ip, a.port) for a in listening] == [("127.0.0.1", port)]


# --------------------------------------------------------------------------- single questions


@needs_browser
@pytest.mark.parametrize("name", ["single", RANKS])
def test_single_questions_with_and_without_a_system_prompt(visit, model, name):
    visitor = visit(name)
    assert visitor.options("system_prompt") == list(SYSTEM_PROMPTS)
    visitor.set("max_gen_len", 12)
    question = "What is the capital of France?"
    for system_prompt, given in (("alpaca", ""), ("alpaca", "Paris is a town."), ("None", "Paris is a town.")):
        visitor.choose("system_prompt", system_prompt)
        visitor.set("input", given)
        visitor.ask(question)
        expected = model.generate([format_prompt(question, given, system_prompt)], max_gen_len=12)[0]
        assert visitor.answer() == expected, (system_prompt, given)
        assert visitor.question() == question
        visitor.afresh()


@needs_browser
@pytest.mark.parametrize("name", ["single", RANKS])
def test_whoever_stops_or_leaves_frees_the_model(visit, come, name):
    visitor, other = come(name), visit(name)
    visitor.set("max_gen_len", LONG)
    visitor.ask("Tell me all", wait="Writing")
    visitor.page.wait_for_function("document.querySelector('#output textarea').value.length > 20")
    visitor.press("stop")
    visitor.status("Stopped after")
    visitor.ask("Tell me all again", wait="Writing")
    visitor.leave()
    other.set("max_gen_len", 4)
    started = time.monotonic()
    other.ask("And now?")
    assert time.monotonic() - started < 6


@needs_browser
@pytest.mark.parametrize("name", ["single", WRAPPED, RANKS])
def test_two_visitors_are_answered_at_once(come, name):
    first, second = come(name), come(name)
    for visitor in (first, second):
        visitor.set("max_gen_len", LONG)
        visitor.ask("Tell me all", wait="Writing")
    for _ in range(2):
        for visitor in (first, second):
            visitor.grows()
    for visitor in (first, second):
        visitor.leave()


# --------------------------------------------------------------------------- beginning and ending


@needs_browser
@pytest.mark.parametrize("name", ["multi", pytest.param("single", marks=pytest.mark.slow), WRAPPED, RANKS])
def test_ctrl_c_ends_every_process_even_while_one_answers(visit, served, name):
    visitor = visit(name)
    visitor.set("max_gen_len", LONG)
    visitor.ask("Tell me all", wait="Writing")
    assert served[name].interrupt() < 10
    said_last = served[name].log.read_text()
    assert "stopped" in said_last
    if name != "ranks":  # torchrun itself shows a traceback when it is interrupted
        assert served[name].process.returncode == 0
        assert "Traceback" not in said_last


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1, 2], ids=["torchrun", "rank 0", "rank 1"])
def test_a_process_that_is_killed_ends_them_all(folders, browser, killed):
    command = web.demo_command(
        "single_turn.py", "--pretrained_path", folders / "base", "--max_seq_len", MAX_SEQ_LEN, "--port", free_port(),
        ranks=2, port=free_port(),
    )  # fmt: skip
    demo = web.Served(command, PACKAGE, folders / "killed.log")
    try:
        visitor = web.Visitor(browser, demo.url)
        visitor.set("max_gen_len", LONG)
        visitor.ask("Tell me all", wait="Writing")
        family = demo.family()
        family[killed].kill()
        assert demo.process.wait(10) != 0
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
        visitor.leave()
    finally:
        demo.kill()
