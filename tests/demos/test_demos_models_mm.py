"""The image demos with small models, on one rank and two: the page shows the text of `MetaModel`."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import browser as web
from helpers import pictures
from helpers.seeing import write_seeing

from accessory.data.conversation import Conversation
from accessory.data.system_prompt import format_prompt
from accessory.demos import multi_turn_mm, serving
from accessory.demos.serving import ENDING, _free_port
from accessory.model.meta import MetaModel

pytestmark = pytest.mark.skipif(web.missing() is not None, reason=str(web.missing()))

PACKAGE = Path(__file__).parents[2] / "accessory"
MAX_SEQ_LEN = 256


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    pictures.write_picture(folder / "a cat.png", 64, 48)
    pictures.noise(32, 40).save(folder / "dog.jpg")
    return folder


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def browser():
    with web.chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return write_seeing(tmp_path_factory.mktemp("seeing") / "model", shards=2)


@pytest.fixture(scope="module")
def model(seeing):
    options = {"dtype": torch.float32, "max_seq_len": MAX_SEQ_LEN, "device": "cpu"}
    return MetaModel.from_pretrained(seeing, with_visual=True, image_transform="resized_center_crop", **options)


def options(folder: Path) -> list[object]:
    words = ["--pretrained_path", folder, "--max_seq_len", MAX_SEQ_LEN, "--dtype", "fp32"]
    return [*words, "--image_transform", "resized_center_crop"]


@pytest.mark.slow
def test_a_single_question_to_a_model(seeing, model, browser, files, tmp_path):
    command = web.demo_command("single_turn_mm.py", *options(seeing), "--port", 0)
    check_single(command, model, browser, files, tmp_path)


@pytest.mark.slow
def test_a_single_question_to_two_ranks(seeing, model, browser, files, tmp_path):
    ports = [_free_port("127.0.0.1", 0) for _ in range(2)]
    command = web.demo_command("single_turn_mm.py", *options(seeing), "--port", ports[0], ranks=2, port=ports[1])
    check_single(command, model, browser, files, tmp_path)


def check_single(command, model, browser, files, tmp_path):
    demo = web.Served(command, PACKAGE, tmp_path / "log")
    try:
        visitor = web.Visitor(browser, demo.url)
        visitor.set("max_gen_len", 8)
        answers = []
        for image in (None, files / "a cat.png"):
            if image is not None:
                visitor.upload(image)
            visitor.ask("What is it?")
            answers.append(visitor.answer())
            expected = model.generate([format_prompt("What is it?")], [image], max_gen_len=8)[0]
            assert answers[-1] == expected
        assert answers[0] != answers[1]
        visitor.leave()
        assert demo.interrupt() < 10
        assert "Traceback" not in demo.log.read_text() or "distributed.run" in " ".join(command)
    finally:
        demo.kill()


@pytest.mark.slow
def test_a_dialogue_with_two_ranks(seeing, model, browser, files, tmp_path):
    command = web.demo_command("multi_turn_mm.py", "--n-gpus", 2, *options(seeing), "--port", 0)
    demo = web.Served(command, PACKAGE, tmp_path / "log")
    try:
        visitor = web.Visitor(browser, demo.url)
        visitor.set("max_gen_len", 8)
        visitor.upload(files / "dog.jpg")
        visitor.ask("What is it?")
        how = Conversation("default").add("user", "What is it?")
        ids = how.prompt_ids(model.tokenizer)
        expected = model.generate([ids], [files / "dog.jpg"], max_gen_len=8, additional_stop_symbols=["\n###"])[0]
        shown = "".join(filter(str.isalnum, visitor.rounds()[-1][1]))
        assert shown == "".join(filter(str.isalnum, how.template.reply(expected)))
        visitor.leave()
        assert demo.interrupt() < 10
        assert "Traceback" not in demo.log.read_text()
    finally:
        demo.kill()


def test_a_model_of_text_alone_is_one_line(seeing, signals, tmp_path, capsys):
    shutil.copytree(seeing, tmp_path / "text")
    meta = tmp_path / "text" / "meta.json"
    meta.write_text(json.dumps({"llama_type": "mixtral_sparse"}))
    assert multi_turn_mm.main([*map(str, options(tmp_path / "text")), "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: with_visual: got True, but mixtral_sparse takes no images")
    assert error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--image_transform", "--image-transform"])
def test_the_pages_with_images_have_an_option_more(flag, capsys):
    words = ["--pretrained_path", "a"]
    seeing = vars(serving.parser("demo", "", images=True).parse_args([*words, flag, "resized_center_crop"]))
    assert seeing.pop("image_transform") == "resized_center_crop"
    assert seeing == vars(serving.parser("demo", "").parse_args(words))
    assert serving.parser("demo", "", images=True).parse_args(words).image_transform == "padded_resize"
    for parser, value in ((serving.parser("demo", ""), "padded_resize"), (serving.parser("demo", "", True), "fold")):
        with pytest.raises(SystemExit):
            parser.parse_args([*words, flag, value])
    capsys.readouterr()
