"""What is typed into a chat: its commands, and how lines are read, with prompt_toolkit and without."""

from __future__ import annotations

import json
import sys
import threading
from argparse import Namespace

import pytest
from helpers.command_line import standard_input

from accessory.command_line import Parser
from accessory.commands.dialogue import COMMANDS
from accessory.commands.line_editor import reader
from accessory.commands.talking import Growing, talk
from accessory.commands.text_options import SETTINGS, add_chat_arguments, check_text_options
from accessory.errors import InputError, ServerError


def options_of(*words: str) -> Namespace:
    parser = Parser()
    add_chat_arguments(parser)
    options = parser.parse_args(["model", *words])
    check_text_options(options)
    return options


class Answering:
    """Answers with the number of the request. Keeps the messages, and the sampling, of every request."""

    def __init__(self, options: Namespace) -> None:
        self.options, self.asked, self.samplings, self.failing = options, [], [], {}

    def __call__(self, messages, image):
        self.asked.append([dict(message) for message in messages])
        self.samplings.append((self.options.sampling, self.options.max_gen_len))
        number = len(self.asked)
        yield Growing(f"Answer {number}"[:3], 1)
        if number in self.failing:
            raise self.failing[number]
        yield Growing(f"Answer {number}", 3)


@pytest.fixture
def chat(monkeypatch, capsys, tmp_path):
    """Type lines into a chat; returns what was printed after each prompt, and who answered."""
    monkeypatch.chdir(tmp_path)

    def run(*lines: str, failing=None, options: tuple[str, ...] = ()):
        standard_input(monkeypatch, "".join(line + "\n" for line in lines))
        answering = Answering(options_of(*options))
        answering.failing = failing or {}
        status = talk(answering, "Hello", answering.options, text_only="no images")
        assert status == 0
        return capsys.readouterr().out.split("\n> ")[1:], answering

    return run


def questions(asked):
    return [[message["content"] for message in messages] for messages in asked]


# --------------------------------------------------------------------------- commands


def test_help_names_every_command_that_this_chat_has(chat):
    (told, *_), answering = chat("/help")
    assert all(len(line) <= 80 for line in told.splitlines())
    assert [line.split()[0] for line in told.splitlines()[:-1]] == [name for name in COMMANDS if name != "/image"]
    assert not answering.asked


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/hepl", "/hepl is no command; did you mean /help? Begin with // to send it"),
        ("/etc/passwd is a file", "/etc/passwd is no command; /help lists them. Begin with // to send it"),
        ("/undo 2", "/undo: got '2', but nothing follows it"),
        ("/set", "temperature 0)"),
        ("/set temprature 1", "/set: temprature is no setting; did you mean temperature?"),
        ("/set logprobs 1", "/set: logprobs is no setting"),
        ("/set top-p", "/set: there is no value; give /set top-p VALUE"),
        ("/set temperature hot", "temperature: got 'hot', but it must be 0 (greedy) or a greater number"),
        ("/set temperature nan", "temperature: got nan, but"),
        ("/set temperature none", "temperature: got 'none', but"),
        ("/set top-p 1.5", "top-p: got 1.5, but it must be a number greater than 0 and at most 1"),
        ("/set top-k 1.5", "top-k: got '1.5', but it must be a whole number"),
        ("/set max_gen_len 4096", "max-gen-len: got 4096, but it must be a whole number from 1 to max-seq-len - 1"),
        ("/retry", "/retry: there is no question yet"),
        ("/save", "/save: there is no file; give /save FILE"),
        ("/save a.json", "/save: there is no message yet"),
        ("/load absent.json", "/load: absent.json: cannot be read (No such file or directory)"),
        ("/image a.png", "/image: no images"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_and_never_sent(chat, typed, said):
    (told, *_), answering = chat(typed, "Hello")
    assert said in told.splitlines()[0]
    assert len(told.splitlines()) == (len(SETTINGS) if typed == "/set" else 1)
    assert questions(answering.asked) == [["Hello"]]
    assert answering.samplings == [(options_of().sampling, options_of().max_gen_len)]


def test_two_slashes_send_a_message_that_begins_with_one(chat):
    _, answering = chat("//help me", "/* a comment */", "///")
    assert questions(answering.asked)[-1][::2] == ["/help me", "/* a comment */", "//"]


def test_the_system_message_changes_shows_and_goes(chat):
    outs, answering = chat(
        "/system", "One", "/system Be  brief.", "Two", "/system", "/system none", "Three", options=("--system", "Be.")
    )
    assert outs[0] == outs[0].splitlines()[0] + "\n" == "(system message: Be.)\n"
    assert [outs[n] for n in (2, 4)] == ["(system message: Be  brief.)\n"] * 2
    assert outs[5] == "(no system message)\n"
    assert [messages[0] for messages in answering.asked] == [
        {"role": "system", "content": "Be."},
        {"role": "system", "content": "Be  brief."},
        {"role": "user", "content": "One"},
    ]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_does_what_its_option_does(chat, name):
    value = {"temperature": "0.5", "seed": "7", "max_gen_len": "9", "top_p": "0.5"}.get(name, "1")
    option = name.replace("_", "-")
    (told, *_), answering = chat(f"/set {option} {value}", "Hello", f"/set {name}  {value}")
    assert told == f"({option} {value})\n"
    expected = options_of(f"--{option}={value}")
    assert answering.samplings == [(expected.sampling, expected.max_gen_len)]


def test_what_has_no_default_number_is_taken_away_by_none(chat):
    outs, answering = chat("/set seed none", "/set max-gen-len none", options=("--seed", "3", "--max-gen-len", "5"))
    assert outs[:2] == ["(seed none)\n", "(max-gen-len 512)\n"]
    assert answering.options.sampling.seed is None


def test_retry_asks_the_last_question_once_more(chat):
    _, answering = chat("One", "Two", "/retry", "/retry", "/undo", "/retry", "Three")
    assert questions(answering.asked)[2:] == [
        ["One", "Answer 1", "Two"],
        ["One", "Answer 1", "Two"],
        ["One"],
        ["One", "Answer 5", "Three"],
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ServerError("it is gone")])
def test_retry_asks_a_question_whose_answer_failed_and_not_one_before(chat, error):
    outs, answering = chat("One", "Two", "/retry", failing={2: error})
    assert "the round is forgotten" in outs[1]
    assert questions(answering.asked)[1:] == [["One", "Answer 1", "Two"]] * 2


def test_clear_and_another_question_forget_what_retry_would_ask(chat):
    outs, answering = chat("One", "/clear", "/retry", failing={1: KeyboardInterrupt()})
    assert "there is no question yet" in outs[2]
    _, answering = chat("One", "Two", "/retry", failing={1: KeyboardInterrupt()})
    assert questions(answering.asked) == [["One"], ["Two"], ["Two"]]


# --------------------------------------------------------------------------- files


def test_a_dialogue_that_was_saved_goes_on(chat, tmp_path):
    outs, _ = chat("Grüße \ud800", "Two", "/save a b.json", options=("--system", "Be brief."))
    assert outs[2] == "(a b.json: 5 messages)\n"
    saved = json.loads((tmp_path / "a b.json").read_text(encoding="utf-8"))
    assert [message["role"] for message in saved["messages"]] == ["system", *["user", "assistant"] * 2]
    assert saved["messages"][1]["content"] == "Grüße \ud800"
    assert list(tmp_path.iterdir()) == [tmp_path / "a b.json"]
    outs, answering = chat("Before", "/load 'a b.json'", "Three")
    assert outs[1] == "(a b.json: 5 messages)\n"
    assert answering.asked[1] == [*saved["messages"], {"role": "user", "content": "Three"}]


def test_a_file_is_replaced_only_where_that_is_said(chat, tmp_path):
    (tmp_path / "a.json").write_text("mine")
    outs, _ = chat("One", "/save a.json")
    assert outs[1] == "(/save: a.json: is there already; /save --overwrite FILE replaces it)\n"
    assert (tmp_path / "a.json").read_text() == "mine"
    outs, _ = chat("One", "/save --overwrite a.json")
    assert outs[1] == "(a.json: 2 messages)\n"
    assert len(json.loads((tmp_path / "a.json").read_text())["messages"]) == 2


def test_a_save_that_fails_leaves_nothing(chat, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    outs, _ = chat("One", "/save a.json", "/save absent/a.json", "/save .")
    assert outs[1] == "(/save: a.json: cannot be written (No space left on device))\n"
    assert outs[2] == "(/save: absent/a.json: cannot be written (No such file or directory))\n"
    assert outs[3] == "(/save: .: is no file; give another name)\n"
    assert not list(tmp_path.iterdir())


def test_a_question_without_an_answer_is_left_for_retry(chat, tmp_path):
    (tmp_path / "a.json").write_text('[{"role": "user", "content": "One"}]')
    outs, answering = chat("/load a.json", "/retry")
    assert outs[0] == "(a.json: 1 message; the last one has no answer, /retry asks for it)\n"
    assert questions(answering.asked) == [["One"]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is no JSON (Expecting property name"),
        (b"\xff", "is no JSON ('utf-8' codec"),
        (b"[" * 100_000, "is no JSON ("),
        (b'{"model": "x"}', "found neither messages nor conversations among model"),
        (b'[{"role": "tool", "content": ""}]', "messages[0]: unknown role 'tool'"),
        (b'[{"role": "user", "content": [{"type": "image_url"}]}]', "messages[0]: content: got"),
    ],
)
def test_a_file_that_is_no_dialogue_changes_nothing(chat, tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    outs, answering = chat("One", "/load a.json", "Two")
    assert outs[1].startswith("(/load: a.json: ")
    assert said in outs[1]
    assert outs[1].count("\n") == 1
    assert questions(answering.asked)[1] == ["One", "Answer 1", "Two"]


# --------------------------------------------------------------------------- reading lines


def test_a_line_that_ends_with_a_backslash_goes_on(chat):
    outs, answering = chat("One\\", "two\\", "three", "Four\\")
    assert questions(answering.asked)[0] == ["One\ntwo\nthree"]
    assert questions(answering.asked)[1][-1] == "Four"  # the input ends there
    assert outs[0].startswith("    Answer 1")


@pytest.fixture
def typed(monkeypatch):
    """Type keys into the editor of a terminal; returns the messages that it reads until the input ends."""
    toolkit = pytest.importorskip("prompt_toolkit", reason="the extra chat is not installed")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    assert toolkit
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)

    def run(keys: str, later: str = "") -> list[str]:
        found = []
        with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
            keyboard.send_text(keys if later else keys + END)
            timer = threading.Timer(0.5, keyboard.send_text, [later + END])
            if later:
                timer.start()
            read = reader()
            while True:
                try:
                    found.append(read())
                except EOFError:
                    return found

    return run


UP, LEFT, ALT_ENTER, CTRL_A, CTRL_C, END = "\x1b[A", "\x1b[D", "\x1b\r", "\x01", "\x03", "\x04"


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        ("Hello\r", ["Hello"]),
        (f"Hllo{LEFT * 3}e\r", ["Hello"]),
        (f"llo{CTRL_A}He\r", ["Hello"]),
        ("One\\\rtwo\\\rthree\r", ["One\ntwo\nthree"]),
        (f"One{ALT_ENTER}two\r", ["One\ntwo"]),
        ("\x1b[200~One\ntwo\x1b[201~\r", ["One\ntwo"]),  # pasted
        (f"nothing{CTRL_C}Hello\r", ["Hello"]),
        ("/he\t\r", ["/help"]),
        ("/sy\tBe brief.\r", ["/system Be brief."]),
        ("/set temp\t 1\r", ["/set temperature 1"]),
        ("he\t\r", ["he"]),
    ],
)  # fmt: skip
def test_the_editor_of_a_terminal(typed, keys, messages):
    assert typed(keys) == messages


def test_the_editor_remembers_what_was_typed(typed):
    later = f"{UP}{UP}!\r"  # the editor has to have begun, because it reads its history then
    assert typed("One\rTwo\r", later) == ["One", "Two", "One!"]


def test_a_path_is_completed(typed, tmp_path):
    (tmp_path / "dialogue.json").touch()
    assert typed(f"/load {tmp_path}/dia\t\r") == [f"/load {tmp_path}/dialogue.json"]


def test_ctrl_c_on_an_empty_line_ends_the_chat(typed):
    with pytest.raises(KeyboardInterrupt):
        typed(CTRL_C)


def test_without_prompt_toolkit_a_terminal_is_read_line_by_line(typed, monkeypatch):
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    standard_input(monkeypatch, "Hello\n")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert typed("") == ["Hello"]


@pytest.mark.parametrize("other", ["stdin", "stdout"])
def test_what_is_no_terminal_is_read_line_by_line(typed, monkeypatch, other):
    standard_input(monkeypatch, "Hello\n")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(f"sys.{other}.isatty", lambda: False)
    assert typed("") == ["Hello"]


# --------------------------------------------------------------------------- speed


def test_a_terminal_shows_tokens_and_speed(chat, monkeypatch):
    clock = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr("accessory.commands.talking.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    (told, *_), _ = chat("Hello")
    assert told == "Answer 1\n\x1b[2m3 tokens, 2.0 tokens/s after 2.00 s\x1b[0m\n"


def test_a_pipe_has_the_answer_only(chat):
    (told, *_), _ = chat("Hello")
    assert told == "Answer 1\n"


def test_an_error_of_the_check_leaves_the_setting_as_it_was():
    from accessory.commands.text_options import change_setting

    options = options_of("--top-p", "0.5")
    with pytest.raises(InputError):
        change_setting(options, "top_p", "2")
    assert (options.top_p, options.sampling.top_p) == (0.5, 0.5)
