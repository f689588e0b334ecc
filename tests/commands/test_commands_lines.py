"""`accessory generate --lines`: a file answered in its order, with `--out` into a file, where a later run goes on."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from helpers import pictures
from helpers.lines import HOW, WORDS, read, write_jsonl
from helpers.seeing import write_seeing

from accessory.cli import main
from accessory.data.conversation import Conversation
from accessory.data.templates import get_template
from accessory.engine.sampling_params import SamplingParams
from accessory.model import text_model
from accessory.model.meta import MetaModel
from accessory.nn.decoder import Decoder
from accessory.progress import progress_bar


@pytest.fixture(scope="module")
def model(lines_folder):
    return MetaModel.from_pretrained(lines_folder, dtype=torch.float32, device="cpu", max_seq_len=128)


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


def test_deterministic_answers_are_those_of_one_prompt_alone_in_bf16_too(answer, lines_folder, here):
    assert answer("--dtype", "bf16", "--deterministic", "--logprobs", "2", "--max-gen-len", "12")[0] == 0
    model = MetaModel.from_pretrained(lines_folder, device="cpu", max_seq_len=128, deterministic=True)
    params = SamplingParams(logprobs=2)
    for word, found in zip(WORDS, read(here / "out.jsonl"), strict=True):
        (alone,) = model.complete([word], max_gen_len=12, params=params)
        assert found["text"] == alone.text
        assert [token["logprob"] for token in found["logprobs"]] == alone.logprobs


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


def test_ctrl_c_keeps_what_was_written(lines_folder, answer, here, capsys, monkeypatch):
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
    assert main(["generate", str(lines_folder), *HOW, *words]) == 130
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


def test_a_line_is_in_the_file_when_the_next_one_is_written(lines_folder, here):
    words = ["generate", str(lines_folder), *HOW, "--prompt-file", "in.txt", "--lines", "--out", "out.jsonl"]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [line["prompt"] for line in read(here / "out.jsonl")] == WORDS[:3]


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
