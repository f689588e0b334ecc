"""The options that both demos share, and errors in them. test_demos_pages.py really starts the demos."""

from __future__ import annotations

import signal
import socket
import sys

import pytest

from accessory.demos import multi_turn, serving, single_turn


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in serving.ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("demo", [single_turn, multi_turn])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "TAKEN"], "--port: TAKEN on 127.0.0.1 is in use; give another one, or 0 for any that is free"),
        (["--host", "203.0.113.1", "--port", "0"], "--host: cannot serve on 203.0.113.1"),
        (["--port", "0"], "nowhere"),
        (["--port", "0", "--quant", "int3"], "quant: got 'int3'"),
        (["--port", "0", "--gpu-ids", "1", "1"], "--gpu_ids: got "),
    ],
)
def test_a_users_mistake_is_one_line(demo, options, message, signals, tmp_path, capsys):
    pytest.importorskip("gradio", reason="needs gradio: pip install gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        given = [port if option == "TAKEN" else option for option in options]
        assert demo.main(["--pretrained_path", str(tmp_path / "nowhere"), *given]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message.replace("TAKEN", port) in error


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 2 GiB. GPU 0 …", "no number"])
def test_memory_that_runs_out_is_one_line(text, signals, tmp_path, monkeypatch, capsys):
    import torch

    def full(*_):
        raise torch.OutOfMemoryError(f"{text}\nmore")

    monkeypatch.setattr("accessory.demos.serving.import_gradio", lambda: None)
    monkeypatch.setattr("accessory.demos.serving._start_alone", full)
    assert single_turn.main(["--pretrained_path", str(tmp_path), "--port", "0"]) == 1
    said = "2 GiB more were asked for" if "2 GiB" in text else text
    assert capsys.readouterr().err == f"error: memory ran out: {said}\n"


def test_without_gradio_the_pip_line_is_the_answer(signals, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert single_turn.main(["--pretrained_path", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: the pages need Gradio: pip install 'mixtral-accessory[demo]'\n"


def test_multi_turn_is_not_for_torchrun(signals, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="needs gradio: pip install gradio")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert multi_turn.main(["--pretrained_path", str(tmp_path), "--port", "0"]) == 1
    assert "run it with python and --n_gpus N" in capsys.readouterr().err


@pytest.mark.parametrize("dash", ["-", "_"])
def test_the_pages_flags_in_both_spellings(dash):
    line = (
        "--pretrained_path a b --llama_type mixtral --llama_config c d --tokenizer_path t --max_seq_len 9 --dtype fp16 "
        "--quant --quant_attention int8 --gpu_ids 0 1 --master_port 23560 --master_addr h --host 0.0.0.0 --port 0 "
        "--share --cache_dtype fp8 --cache_gb 1.5 --deterministic"
    )
    words = [word.replace("_", dash) if word.startswith("--") else word for word in line.split()]
    options = vars(serving.parser("demo", "").parse_args(words))
    assert options == {
        "pretrained_path": ["a", "b"], "llama_type": "mixtral", "llama_config": ["c", "d"], "tokenizer_path": "t",
        "max_seq_len": 9, "dtype": "fp16", "quant": True, "quant_attention": "int8",
        "quant_output": None, "gpu_ids": [0, 1], "master_port": 23560, "master_addr": "h",
        "cache_dtype": "fp8", "cache_gb": 1.5, "host": "0.0.0.0", "port": 0, "share": True, "debug": False,
        "deterministic": True,
    }  # fmt: skip
    defaults = serving.parser("demo", "").parse_args(["--pretrained_path", "a"])
    assert (defaults.host, defaults.port, defaults.share) == ("127.0.0.1", 7860, False)
