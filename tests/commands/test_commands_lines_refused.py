"""What `accessory generate --lines` refuses before a model is loaded, and the files that it leaves as they are."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys

import pytest
from helpers import pictures
from helpers.lines import HOW, ONE_ERROR, WORDS, write_jsonl

from accessory.cli import main

# --------------------------------------------------------------------------- files


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


# --------------------------------------------------------------------------- lines and options


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
def test_options_that_do_not_go_together(lines_folder, here, capsys, loaded, options, said):
    pictures.write_picture(here / "a.png", 4, 4)
    (here / "latin.txt").write_bytes("größe\n".encode("latin-1"))
    assert main(["generate", str(lines_folder), *HOW, *options]) == 1
    err = capsys.readouterr().err
    assert ONE_ERROR.fullmatch(err)
    assert said in err
    assert loaded["models"] == 0


def test_wrong_lines_are_told_without_torch(lines_folder, here):
    write_jsonl(here / "in.jsonl", "{")
    words = ["generate", str(lines_folder), "--prompt-file", "in.jsonl", "--lines", "--out", "o"]
    code = f"import sys\nfrom accessory.cli import main\nmain({words})\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "in.jsonl:1: not valid JSON" in done.stderr) == (0, True), done.stderr
