"""`accessory generate --image` and `/image` in a chat: what reaches the model, and errors of one line."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from helpers import pictures
from helpers.seeing import write_seeing

from accessory.cli import main
from accessory.data.conversation import Conversation
from accessory.data.templates import get_template
from accessory.model.meta import Completion, MetaModel

PROMPT = "What is it?"
HOW = ["--dtype", "fp32", "--device", "cpu", "--max-seq-len", "128"]
ONE_ERROR = re.compile(r"accessory: error: [^\n]+\n")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return write_seeing(tmp_path_factory.mktemp("images") / "model", shards=2)


@pytest.fixture(scope="module")
def text_only(seeing):
    folder = seeing.with_name("text only")
    shutil.copytree(seeing, folder)
    (folder / "meta.json").write_text(json.dumps({"llama_type": "mixtral_sparse"}))
    return folder


@pytest.fixture(scope="module")
def model(seeing):
    return MetaModel.from_pretrained(seeing, with_visual=True, dtype=torch.float32, max_seq_len=128, device="cpu")


@pytest.fixture
def here(tmp_path, monkeypatch):
    pictures.write_picture(tmp_path / "a cat.png", 40, 20)
    pictures.write_picture(tmp_path / "dog.png", 20, 40, seed=1)
    (tmp_path / "text.png").write_bytes(b"not a picture")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def generate(seeing, here, capsys):
    def run(*options: str) -> str:
        assert main(["generate", str(seeing), *HOW, "--max-gen-len", "6", *options]) == 0
        return capsys.readouterr().out

    return run


# --------------------------------------------------------------------------- generate


def test_a_prompt_about_an_image(generate, model):
    with_cat, without = model.generate([PROMPT] * 2, ["a cat.png", None], max_gen_len=6)
    assert with_cat != without
    assert generate("--prompt", PROMPT, "--image", "~/a cat.png") == with_cat + "\n"
    assert generate("--prompt", PROMPT, "--image", "a cat.png", "--stream") == with_cat + "\n"
    assert generate("--prompt", PROMPT, "--with-visual") == without + "\n"


def test_several_prompts_have_an_image_each_or_none(generate, model):
    prompts = [word for text in ("One", "Two", "Three") for word in ("--prompt", text)]
    images = ["dog.png", None, "a cat.png"]
    expected = model.generate(["One", "Two", "Three"], images, max_gen_len=6)
    for none in ("none", "-"):
        out = generate(*prompts, "--image", "dog.png", "--image", none, "--image", "a cat.png", "--json")
        answers = [json.loads(line) for line in out.splitlines()]
        assert [a["text"] for a in answers] == expected
        assert [a["image"] for a in answers] == ["dog.png", none, "a cat.png"]


def test_questions_about_images_in_a_template(generate, model):
    talk = Conversation("chatml").add("user", PROMPT).prompt_ids(model.tokenizer)
    how = {"max_gen_len": 6, "additional_stop_symbols": get_template("chatml").stop_strings}
    expected = model.generate([talk] * 2, ["dog.png", None], **how)
    words = ["--prompt", f"<image>\n{PROMPT}", "--prompt", PROMPT, "--image", "dog.png", "--image", "none"]
    told = [json.loads(line) for line in generate(*words, "--template", "chatml", "--json").splitlines()]
    assert [t["text"] for t in told] == [get_template("chatml").reply(text) for text in expected]
    assert [t["prompt"] for t in told] == [f"<image>\n{PROMPT}", PROMPT]


def test_the_transform_can_be_chosen(seeing, generate, model):
    how = {"dtype": torch.float32, "max_seq_len": 128, "device": "cpu", "with_visual": True}
    other = MetaModel.from_pretrained(seeing, image_transform="resized_center_crop", **how)
    expected = other.generate([PROMPT], ["dog.png"], max_gen_len=6)[0]
    assert expected != model.generate([PROMPT], ["dog.png"], max_gen_len=6)[0]
    told = ("--image_transform", "resized_center_crop")
    assert generate("--prompt", PROMPT, "--image", "dog.png", *told) == expected + "\n"


def test_images_that_are_all_none_need_no_model_that_sees(text_only, here, capsys):
    command = ["generate", str(text_only), *HOW, "--max-gen-len", "2", "--prompt", PROMPT, "--image", "none"]
    assert main(command) == 0
    assert ONE_ERROR.search(capsys.readouterr().err) is None


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["our own", "torchrun"])
def test_two_ranks_see_the_same(seeing, here, model, launcher):
    prompts = ["--prompt", PROMPT, "--image", "a cat.png", "--prompt", "One", "--image", "none"]
    first, second = model.generate([PROMPT, "One"], ["a cat.png", None], max_gen_len=6)
    words = ["accessory", "generate", str(seeing), *HOW, "--max-gen-len", "6", *prompts]
    if launcher == "torchrun":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "-m", *words]
    else:
        words += ["--n-gpus", "2"]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (0, f"# 1/2: {PROMPT}\n{first}\n# 2/2: One\n{second}\n"), done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--image", "absent.png"], "absent.png: no such file"),
        (["--image", "~no-such-user/dog.png"], "~no-such-user/dog.png: no such file"),
        (["--image", "text.png"], "text.png: is not an image"),
        (["--image", "dog.png", "--image", "dog.png"], "--image: got 2 for 1 prompts; give one each"),
        (["--prompt", "Two", "--image", "dog.png"], "--image: got 1 for 2 prompts; give one each"),
        (["--image", "dog.png", "--max-seq-len", "12"], "its image takes 7 positions"),
    ],
)
def test_a_mistake_is_one_line(seeing, here, capsys, options, words):
    assert main(["generate", str(seeing), *HOW, "--max-gen-len", "6", "--prompt", PROMPT, *options]) == 1
    captured = capsys.readouterr()
    assert ONE_ERROR.fullmatch(captured.err)
    assert words in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("command", [["generate", "--prompt", PROMPT], ["chat"]], ids=lambda c: c[0])
def test_a_broken_image_is_told_before_a_model_is_opened(here, capsys, command):
    assert main([command[0], "no such model", *command[1:], "--image", "text.png"]) == 1
    assert "text.png: is not an image" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["generate", "--prompt", PROMPT], ["chat"]], ids=lambda c: c[0])
def test_a_model_of_text_alone_says_so(text_only, here, capsys, monkeypatch, command):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for options in (["--image", "dog.png"], ["--with-visual"]):
        assert main([command[0], str(text_only), *HOW, *command[1:], *options]) == 1
        error = capsys.readouterr().err
        assert ONE_ERROR.fullmatch(error)
        assert "with_visual: got True, but mixtral_sparse takes no images" in error


# --------------------------------------------------------------------------- chat


@pytest.fixture
def chat(seeing, model, here, capsys, monkeypatch):
    """Type lines into `accessory chat`; returns what was shown, and (prompt, size of its image) of every answer."""

    def run(*lines: str, options: tuple[str, ...] = ("--with-visual",)) -> tuple[str, list[tuple[str, object]]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        asked = []

        def recorded(self, prompt, image=None, **how):
            asked.append((self.tokenizer.decode(prompt), None if image is None else image.size))
            yield Completion(1, " Yes")

        def loaded(pretrained_path, **how):
            assert how.get("with_visual", False) is bool(options)
            return model

        monkeypatch.setattr(MetaModel, "stream", recorded)
        monkeypatch.setattr(MetaModel, "from_pretrained", loaded)
        assert main(["chat", str(seeing), *options]) == 0
        return capsys.readouterr().out, asked

    return run


CAT, DOG = (40, 20), (20, 40)


def test_an_image_stays_for_its_dialogue(chat):
    out, asked = chat("/image a cat.png", "What is it?", "Sure?", "/undo", "Really?")
    assert "/image PATH" in out.splitlines()[0]
    assert "(a cat.png: the dialogue is about this image)" in out
    assert [size for _, size in asked] == [CAT] * 3
    assert "What is it?" in asked[2][0]
    assert "Sure?" not in asked[2][0]


def test_a_message_that_speaks_of_no_image(seeing, here, capsys):
    words = ["--prompt", "One", "--prompt", "<image> Two", "--image", "dog.png", "--image", "none"]
    assert main(["generate", str(seeing), *HOW, *words, "--template", "chatml"]) == 1
    error = capsys.readouterr().err
    assert ONE_ERROR.fullmatch(error)
    assert "prompts[1]: speaks of an <image>, but images has none for it" in error


def test_a_question_may_say_where_its_image_is(chat):
    _, asked = chat("<image> What is it?", "/image dog.png", "<image>\tWhat is it?", "What is it?")
    assert ["<image>" in text for text, _ in asked] == [True, False, False]
    assert asked[1][0] in asked[2][0]


def test_another_image_or_none_begins_another_dialogue(chat):
    out, asked = chat(
        "One", "/image dog.png", "Two", "/image", "Three", "/image none", "Four", "/image", "/clear", "Five"
    )
    assert [size for _, size in asked] == [None, DOG, DOG, None, None]
    assert ["One" in text for text, _ in asked] == [True, False, False, False, False]
    assert ["Two" in text for text, _ in asked] == [False, True, True, False, False]
    assert out.count("(dog.png: the dialogue is about this image)") == 2  # also the answer to a bare /image
    assert out.count("(no image)") == 2


def test_clear_forgets_the_image_too(chat):
    _, asked = chat("/clear", "One", "/image dog.png", "/clear", "Two")
    assert [size for _, size in asked] == [None, None]


@pytest.mark.parametrize("written", ["a cat.png", "'a cat.png'", '"a cat.png"', r"a\ cat.png", "~/a cat.png", "'{}'"])
def test_a_path_as_people_and_terminals_write_it(chat, here, written):
    _, asked = chat(f"/image   {written.format(here / 'a cat.png')} ", "One")
    assert asked[0][1] == CAT


def test_a_file_whose_name_needs_no_undoing_wins(chat, here):
    shutil.copy("dog.png", here / "'a cat.png'")
    assert chat("/image 'a cat.png'", "One")[1][0][1] == DOG
    assert shlex.split("'a cat.png'") == ["a cat.png"]


def test_a_broken_image_leaves_the_dialogue_as_it_was(chat):
    long = "/image " + "x" * 5000
    out, asked = chat("/image dog.png", "One", "/image text.png", "/image absent.png", "/image it's", long, "Two")
    assert "(text.png: is not an image" in out
    assert "(absent.png: no such file)" in out
    assert "(it's: no such file)" in out
    assert "x: cannot be read (File name too long)" in out
    assert [size for _, size in asked] == [DOG, DOG]
    assert "One" in asked[1][0]


def test_the_first_image_can_be_an_option(chat):
    _, asked = chat("One", options=("--image", "a cat.png"))
    assert asked[0][1] == CAT


def test_a_chat_that_was_not_started_to_see(chat):
    out, asked = chat("/image dog.png", "/image", "/image none", "One", "//images are words", options=())
    assert "/image" not in out.splitlines()[0]
    assert "(/image: this chat is text only; start it with --with-visual)" in out
    assert out.count("(no image)") == 2
    assert [size for _, size in asked] == [None, None]
