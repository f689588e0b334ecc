"""`accessory generate --lines`: a file answered in its order, with `--out` into a file, where a later run goes on."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from helpers import pictures
from helpers.command_line import write_hf
from helpers.seeing import write_seeing

from accessory.cli import main
from accessory.data.conversation import Conversation
from accessory.data.templates import get_template
from accessory.model import text_model
from accessory.model.meta import MetaModel
from accessory.model.requests import RequestMaker
from accessory.nn.decoder import Decoder
from accessory.progress import progress_bar

HOW = ["--dtype", "fp32", "--device", "cpu", "--max-seq-len", "128", "--max-gen-len", "6"]
WORDS = ["One", "Two words", "Three", "Four", "Five", "Six", "Seven"]
ONE_ERROR = re.compile(r"accessory: error: [^\n]+\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("lines") / "hf")


@pytest.fixture(scope="module")
def model(folder):
    return MetaModel.from_pretrained(folder, dtype=torch.float32, device="cpu", max_seq_len=128)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path


@pytest.fixture
def answer(folder, here, capsys):
    """Run `accessory generate --lines` in this process; returns its status, what it printed, and its one error."""

    def run(*options: str, file: str = "in.txt", out: str | None = "out.jsonl") -> tuple[int, str, str]:
        words = ["--prompt-file", file, "--lines", *(["--out", out] if out else [])]
        status = main(["generate", str(folder), *HOW, *words, *options])
        printed, err = capsys.readouterr()
        err = "".join(line for line in err.splitlines(keepends=True) if line.startswith("accessory: "))
        assert err == "" or ONE_ERROR.fullmatch(err)
        return status, printed, err

    return run


@pytest.fixture
def loaded(monkeypatch):
    """Which models were loaded, and how many requests were made, while the test ran."""
    seen = {"models": 0, "requests": 0}
    load, make = MetaModel.from_pretrained.__func__, RequestMaker.make

    def counted_load(cls, *args, **how):
        seen["models"] += 1
        return load(cls, *args, **how)

    def counted_make(self, *args):
        seen["requests"] += 1
        return make(self, *args)

    monkeypatch.setattr(MetaModel, "from_pretrained", classmethod(counted_load))
    monkeypatch.setattr(RequestMaker, "make", counted_make)
    return seen


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_jsonl(path, *lines) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


# --------------------------------------------------------------------------- answers


def test_a_file_is_answered_line_by_line(answer, model, here):
    assert answer() == (0, "out.jsonl: all 7 prompts are answered\n", "")
    texts = [model.generate([word], max_gen_len=6)[0] for word in WORDS]
    assert read(here / "out.jsonl") == [
        {
            "prompt": word,
            "text": text,
            "prompt_tokens": len(model.tokenizer.encode(word, bos=True)),
            "tokens": 6,
            "finish_reason": "length",
        }
        for word, text in zip(WORDS, texts, strict=True)
    ]
    printed = answer(out=None)
    assert printed[1] == "".join(f"# {n}/7: {w}\n{t}\n" for n, (w, t) in enumerate(zip(WORDS, texts, strict=True), 1))
    assert answer("--json", out=None)[1] == (here / "out.jsonl").read_text()


def test_the_order_is_kept_though_later_ones_end_first(answer, model, here, monkeypatch):
    monkeypatch.setattr(text_model, "AT_ONCE", 3)
    lengths = [40, 1, 30, 2, 3, 20, 1]
    write_jsonl(here / "in.jsonl", *({"prompt": w, "max_gen_len": n} for w, n in zip(WORDS, lengths, strict=True)))
    assert answer(file="in.jsonl")[0] == 0
    found = read(here / "out.jsonl")
    assert [(f["prompt"], f["tokens"]) for f in found] == [*zip(WORDS, lengths, strict=True)]
    alone = [model.generate([w], max_gen_len=n)[0] for w, n in zip(WORDS, lengths, strict=True)]
    assert [f["text"] for f in found] == alone


def test_messages_and_settings_of_their_own(answer, model, here):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    own = {"temperature": 0.5, "seed": 3, "top_k": 50, "max_gen_len": 9, "stop": "zz"}
    lines = [
        {"messages": talk, **own},
        {"messages": talk, **own, "temperature": 0},
        {"prompt": "Hi", "logprobs": 1},
        {"messages": talk, **own},  # equal to the first: another copy
    ]
    write_jsonl(here / "in.jsonl", *lines)
    assert answer("--temperature", "0.4", "--seed", "8", file="in.jsonl")[0] == 0
    found = read(here / "out.jsonl")
    assert [f.get("messages", f.get("prompt")) for f in found] == [talk, talk, "Hi", talk]
    template = get_template(None, model.tokenizer)  # as a chat takes it
    ids = Conversation(template, "Be brief.").add("user", "Hi").prompt_ids(model.tokenizer)
    how = {"max_gen_len": 9, "additional_stop_symbols": [*template.stop_strings, "zz"], "seed": 3, "top_k": 50}
    first, again = map(template.reply, model.generate([ids, ids], temperature=0.5, **how))
    greedy = template.reply(model.generate([ids], **how)[0])
    plain = model.generate(["Hi"], max_gen_len=6, temperature=0.4, seed=8)[0]
    assert [f["text"] for f in found] == [first, greedy, plain, again]
    assert first != again
    assert [("logprobs" in f) for f in found] == [False, False, True, False]


def test_a_template_and_a_system_message_are_for_prompts_and_messages(answer, model, here):
    write_jsonl(here / "in.jsonl", {"prompt": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]})
    assert answer("--template", "alpaca", "--system", "Be brief.", file="in.jsonl")[0] == 0
    ids = Conversation("alpaca", "Be brief.").add("user", "Hi").prompt_ids(model.tokenizer)
    stops = get_template("alpaca").stop_strings
    text = model.generate([ids], max_gen_len=6, additional_stop_symbols=stops)[0]
    assert [f["text"] for f in read(here / "out.jsonl")] == [text, text]


def test_lines_with_images(tmp_path, monkeypatch, capsys):
    folder = write_seeing(tmp_path / "model", shards=1)
    monkeypatch.chdir(tmp_path)
    pictures.write_picture(tmp_path / "cat.png", 40, 20)
    pictures.write_picture(tmp_path / "cut.png", 40, 20)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-60])  # its header is whole
    ask = {"prompt": "What is it?"}
    write_jsonl(tmp_path / "in.jsonl", ask | {"image": "cat.png"}, ask | {"image": "cut.png"}, ask)
    words = ["generate", str(folder), *HOW, "--prompt-file", "in.jsonl", "--lines", "--out", "out.jsonl"]
    assert main(words) == 1
    assert "in.jsonl:1: image: the model would be loaded for text only; give --with-visual" in capsys.readouterr().err
    assert main([*words, "--with-visual"]) == 1
    assert "out.jsonl: 1 of 3 prompts could not be answered" in capsys.readouterr().err
    model = MetaModel.from_pretrained(folder, with_visual=True, dtype=torch.float32, max_seq_len=128, device="cpu")
    first, second, third = read(tmp_path / "out.jsonl")
    expected = model.generate(["What is it?"] * 2, ["cat.png", None], max_gen_len=6)
    assert [first["text"], third["text"]] == expected
    assert "cut.png: is " in second["error"]
    assert [line.get("image") for line in (first, second, third)] == ["cat.png", "cut.png", None]


def test_a_failed_prompt_is_a_line_with_its_error(answer, here, loaded):
    write_jsonl(
        here / "in.jsonl",
        {"prompt": "One"},
        {"prompt": ""},
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        {"prompt": "Two\ud800"},
    )
    status, _, err = answer(file="in.jsonl")
    assert (status, err) == (
        1,
        "accessory: error: out.jsonl: 2 of 4 prompts could not be answered; their lines say why\n",
    )
    first, empty, twice, last = read(here / "out.jsonl")
    assert empty == {"prompt": "", "error": "in.jsonl:2: is empty; give at least one character"}
    assert twice["error"].startswith("in.jsonl:3: messages[1]: the role is user, but the template 'default' wants")
    assert first["text"]
    assert last["text"]
    assert last["prompt"] == "Two\ud800"
    assert answer(file="in.jsonl") == (status, "", err)  # errors stay, and no model is loaded for them
    assert loaded["models"] == 1
    status, printed, err = answer(file="in.jsonl", out=None)
    assert "# 2/4: \n(in.jsonl:2: is empty; give at least one character)\n" in printed
    assert (status, "2 of 4 prompts could not be answered" in err) == (1, True)


# --------------------------------------------------------------------------- going on


@pytest.mark.parametrize("hot", [[], ["--temperature", "0.5", "--seed", "3"]], ids=["greedy", "drawn"])
def test_run_again_it_goes_on_where_it_was_killed(answer, here, loaded, hot):
    (here / "in.txt").write_text("\n".join([*WORDS, *WORDS]))  # equal prompts draw other numbers
    answer(*hot)
    whole = (here / "out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (len(b"".join(lines[:3])), len(b"".join(lines[:9])) + 30, 12, len(whole) - 1, 0):
        (here / "out.jsonl").write_bytes(whole[:cut])
        loaded["requests"] = 0
        assert answer(*hot) == (0, "out.jsonl: all 14 prompts are answered\n", "")
        assert (here / "out.jsonl").read_bytes() == whole
        assert loaded["requests"] == 14 - whole[:cut].count(b"\n")
    models = loaded["models"]
    assert answer(*hot) == (0, "out.jsonl: all 14 prompts were answered already\n", "")
    assert loaded["models"] == models


@pytest.mark.parametrize("launched", [False, True])
def test_what_is_answered_already_loads_no_model(answer, here, monkeypatch, launched):
    """Under a launcher the other ranks wait for the first one, which therefore joins them."""
    answer()
    joined = []
    monkeypatch.setattr("accessory.commands.opening.open_model", lambda *_: joined.append(1) or 1 / 0)
    if launched:
        monkeypatch.setattr("accessory.commands.generate.launch_of", lambda: type("Launch", (), {"rank": 0}))
        with pytest.raises(ZeroDivisionError):
            answer()
    else:
        assert answer()[0] == 0
    assert len(joined) == launched


def test_ctrl_c_keeps_what_was_written(folder, answer, here, capsys, monkeypatch):
    step, calls = Decoder.forward, []

    def interrupted(self, *args, **how):
        calls.append(1)
        if len(calls) == 20:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **how)

    monkeypatch.setattr(text_model, "AT_ONCE", 2)
    monkeypatch.setattr(Decoder, "forward", interrupted)
    before = signal.getsignal(signal.SIGINT)
    words = ["--prompt-file", "in.txt", "--lines", "--out", "out.jsonl"]
    assert main(["generate", str(folder), *HOW, *words]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    there = (here / "out.jsonl").read_bytes()
    assert 0 < there.count(b"\n") < 7
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert answer()[0] == 0
    assert (here / "out.jsonl").read_bytes().startswith(there)
    assert [line["prompt"] for line in read(here / "out.jsonl")] == WORDS


KILLED = """
import os, signal, sys
from accessory.cli import main
from accessory.commands.answer_file import AnswerFile
write = AnswerFile.write
def killing(self, answer):
    write(self, answer)
    if self.done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
AnswerFile.write = killing
main(sys.argv[1:])
"""


def test_a_line_is_in_the_file_when_the_next_one_is_written(folder, here):
    words = ["generate", str(folder), *HOW, "--prompt-file", "in.txt", "--lines", "--out", "out.jsonl"]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [line["prompt"] for line in read(here / "out.jsonl")] == WORDS[:3]


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ('{"prompt": "Other", "text": "x"}\n', "out.jsonl:1: it answers another prompt than in.txt:1"),
        ('{"prompt": "One", "image": "a", "text": "x"}\n', "out.jsonl:1: it answers another prompt"),
        ('{"prompt": "One"}\n', "out.jsonl:1: it is no line of answers"),
        ("[1]\n", "out.jsonl:1: it is no line of answers"),
        ("my notes\n", "out.jsonl:1: it is no line of answers"),
        ("my notes", "out.jsonl:1: it is no answer to this prompt"),
        ('{"prompt": "One", "text": "x"}\n{"prompt": "Three", "te', "out.jsonl:2: it is no answer to this prompt"),
        ("".join(json.dumps({"prompt": w, "text": ""}) + "\n" for w in [*WORDS, "8"]), "there are only 7 prompts"),
        ("".join(json.dumps({"prompt": w, "text": ""}) + "\n" for w in WORDS) + "{", "out.jsonl:8: it is no answer"),
    ],
)
def test_a_file_with_something_else_is_left_as_it_is(answer, here, loaded, there, said):
    (here / "out.jsonl").write_text(there)
    status, _, err = answer()
    assert (status, loaded["models"], (here / "out.jsonl").read_text()) == (1, 0, there)
    assert said in err
    assert "give another --out, or delete this file" in err


def test_files_that_cannot_be_written(answer, here, loaded):
    (here / "folder").mkdir()
    os.symlink("in.txt", "link")
    with open("locked", "x") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for out, said in {
            "folder": "--out: folder: is no file",
            "nowhere/out.jsonl": "--out: nowhere/out.jsonl: cannot be written (No such file or directory)",
            "in.txt": "--out: in.txt: holds the prompts",
            "link": "--out: link: holds the prompts",
            "locked": "--out: locked: another process is writing there",
        }.items():
            status, _, err = answer(out=out)
            assert (status, said in err) == (1, True), err
    assert loaded["models"] == 0
    assert (here / "in.txt").read_text().splitlines() == WORDS


def test_a_run_that_cannot_begin_leaves_no_file(answer, here):
    status, _, err = answer("--llama-type", "mixtral_ens5", "--with-visual")
    assert (status, bool(err), (here / "out.jsonl").exists()) == (1, True, False)


# --------------------------------------------------------------------------- what is refused before a model is loaded


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": ', "in.jsonl:2: not valid JSON"),
        ('"text"', "in.jsonl:2: got 'text', but a line must be an object"),
        ({"prompt": "a", "temprature": 1}, "in.jsonl:2: unknown field 'temprature'; did you mean 'temperature'?"),
        ({"prompt": "a", "max_tokens": 1}, "in.jsonl:2: unknown field 'max_tokens'"),
        ({"temperature": 1}, "in.jsonl:2: give either prompt or messages"),
        ({"prompt": "a", "messages": []}, "in.jsonl:2: give either prompt or messages"),
        ({"prompt": ["a"]}, "in.jsonl:2: prompt: got ['a'], but it must be text"),
        ({"messages": None}, "in.jsonl:2: messages: got a NoneType, but it must be a list"),
        ({"messages": []}, "in.jsonl:2: messages: the list is empty"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "in.jsonl:2: messages[0]: unknown role 'wizard'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "in.jsonl:2: messages: the last one is the assistant"),
        ({"prompt": "a", "temperature": "hot"}, "in.jsonl:2: temperature: got 'hot'"),
        ({"prompt": "a", "seed": -1}, "in.jsonl:2: seed: got -1"),
        ({"prompt": "a", "max_gen_len": 500}, "in.jsonl:2: max_gen_len: got 500"),
        ({"prompt": "a", "stop": [""]}, "in.jsonl:2: stop: got ''"),
        ({"prompt": "a", "stop": 3}, "in.jsonl:2: stop: got 3"),
        ({"prompt": "a", "image": 3}, "in.jsonl:2: image: got 3, but it must be a path"),
        ({"prompt": "a", "image": "no.png"}, "in.jsonl:2: image: no.png: no such file"),
    ],
)
def test_a_wrong_line_is_told_before_anything_is_loaded(answer, here, loaded, line, said):
    write_jsonl(here / "in.jsonl", {"prompt": "good"}, line)
    status, _, err = answer("--with-visual", file="in.jsonl")
    assert (status, loaded["models"], (here / "out.jsonl").exists()) == (1, 0, False)
    assert said in err


def test_a_wrong_turn_is_told_before_anything_is_loaded_where_the_template_is_known(answer, here, loaded):
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    write_jsonl(here / "in.jsonl", {"messages": turns})
    status, _, err = answer("--template", "mistral", file="in.jsonl")
    assert (status, loaded["models"], "in.jsonl:1: messages[1]: the role is user" in err) == (1, 0, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "o", "--prompt", "a"], "--out: is for many prompts; give --lines and --prompt-file too"),
        (["--out", "o", "--prompt-file", "in.txt", "--lines", "--stream"], "--stream: shows a text while it is"),
        (["--prompt-file", "in.txt", "--lines", "--stream"], "--stream: got 7 prompts, but only one can be streamed"),
        (["--prompt-file", "in.txt", "--lines", "--image", "a.png"], "--image: got 1 for 7 prompts"),
        (["--prompt-file", "latin.txt", "--lines"], "latin.txt: not UTF-8 text"),
    ],
)
def test_options_that_do_not_go_together(folder, here, capsys, loaded, options, said):
    pictures.write_picture(here / "a.png", 4, 4)
    (here / "latin.txt").write_bytes("größe\n".encode("latin-1"))
    assert main(["generate", str(folder), *HOW, *options]) == 1
    err = capsys.readouterr().err
    assert ONE_ERROR.fullmatch(err)
    assert said in err
    assert loaded["models"] == 0


def test_wrong_lines_are_told_without_torch(folder, here):
    write_jsonl(here / "in.jsonl", "{")
    words = ["generate", str(folder), "--prompt-file", "in.jsonl", "--lines", "--out", "o"]
    code = f"import sys\nfrom accessory.cli import main\nmain({words})\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "in.jsonl:1: not valid JSON" in done.stderr) == (0, True), done.stderr


# --------------------------------------------------------------------------- the rest


def test_lines_of_standard_input_and_of_pipes(answer, here, monkeypatch):
    answer(out="1")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(WORDS)))
    assert answer(file="-", out="2")[0] == 0
    reader, writer = os.pipe()
    os.write(writer, (here / "in.txt").read_bytes())
    os.close(writer)
    assert answer(file=f"/dev/fd/{reader}", out="3")[0] == 0
    os.close(reader)
    assert (here / "1").read_bytes() == (here / "2").read_bytes() == (here / "3").read_bytes()


def test_progress_counts_prompts_and_tells_the_speed(answer, here, monkeypatch):
    bars = []

    def kept(*args, **how):
        bars.append((args, how, progress_bar(*args, **how)))
        return bars[-1][2]

    monkeypatch.setattr("accessory.commands.answering.progress_bar", kept)
    answer()
    lines = (here / "out.jsonl").read_bytes().splitlines(keepends=True)
    (here / "out.jsonl").write_bytes(b"".join(lines[:2]))
    answer()
    (_, _, first), ((total, what, shown), how, again) = bars
    assert (total, what, shown, how["done"], again.total, again.initial, again.n) == (7, "answering", True, 2, 7, 2, 7)
    assert first.n == 7
    assert re.fullmatch(r"\d+ tokens/s", again.postfix)
