"""The command `accessory`: what it prints, its exit statuses, and that a user's mistake is one line."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.command_line import convert_to_base, program, standard_input, write_hf

from accessory.cli import main

COMMANDS = ("generate", "chat", "convert", "verify", "info", "upcycle", "demo")
ONE_ERROR = re.compile(r"accessory: error: [^\n]+\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("cli") / "hf")


@pytest.fixture(scope="module")
def base(folder):
    return convert_to_base(folder)


# --------------------------------------------------------------------------- checkpoints


def test_convert_verify_info(folder, base, capsys, tmp_path):
    """base, sparse and hf are one model: one hash, the last word that `verify` prints."""
    hashes = set()
    for layout, options in (("sparse", ["--shards", "4", "--safetensors"]), ("hf", []), ("torrent", [])):
        assert main(["convert", str(base), str(tmp_path / layout), "--to", layout, *options]) == 0
        assert capsys.readouterr().out == f"{tmp_path / layout}: written, read again and equal\n"
        assert main(["verify", str(base), str(tmp_path / layout)]) == 0
        hashes.add(capsys.readouterr().out.split()[-1])
    assert main(["verify", str(folder)]) == 0
    hashes.add(capsys.readouterr().out.split()[-1])
    assert len(hashes) == 1
    assert re.fullmatch("[0-9a-f]{64}", hashes.pop())
    assert main(["info", str(tmp_path / "sparse")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"layout +sparse\n", out)
    assert re.search(r"shards +4\n", out)
    assert re.search(r"complete +yes\n", out)


def test_verify_fails_for_what_is_broken_or_another_model(folder, base, capsys, tmp_path):
    shutil.copytree(base, tmp_path / "lacking")
    (tmp_path / "lacking" / "consolidated.01-of-02.model.pth").unlink()
    assert main(["verify", str(tmp_path / "lacking")]) == 1
    out = capsys.readouterr().out
    assert "consolidated.01-of-02.model.pth" in out
    assert out.split()[-1] == "none"
    assert main(["info", str(tmp_path / "lacking")]) == 0
    assert re.search(r"complete +no\n", capsys.readouterr().out)
    assert main(["convert", str(base), str(tmp_path / "bf16"), "--to", "hf", "--dtype", "bf16"]) == 0
    assert main(["verify", str(base), str(tmp_path / "bf16")]) == 1
    assert "dtype differs" in capsys.readouterr().out


def test_convert_replaces_only_when_told_to(base, capsys, tmp_path):
    command = ["convert", str(base), str(tmp_path / "out"), "--to", "sparse"]
    assert main(command) == 0
    assert main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--no-verify", "--shards=2"]) == 0
    assert len(list((tmp_path / "out").glob("*.pth"))) == 2


def test_config_files_complete_a_conversion(base, capsys, tmp_path):
    (tmp_path / "eps.json").write_text('{"norm_eps": 0.001}')
    assert main(["convert", str(base), str(tmp_path / "out"), "--to=base", "--config", str(tmp_path / "eps.json")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["norm_eps"] == 0.001


def test_upcycle(capsys, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "dense")
    command = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "mixture"), "--experts", "3", "--top-k", "1"]
    assert main([*command, "--noise", "0.01", "--seed", "3", "--to", "hf"]) == 0
    config = json.loads((tmp_path / "mixture" / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 1)
    assert main(["verify", str(tmp_path / "mixture")]) == 0
    first = capsys.readouterr().out.split()[-1]
    assert main([*command, "--noise", "0.01", "--seed", "3", "--shards", "1", "--no-verify", "--overwrite"]) == 0
    assert main(["verify", str(tmp_path / "mixture")]) == 0
    assert capsys.readouterr().out.split()[-1] == first


# --------------------------------------------------------------------------- mistakes


def mistakes(folder: Path, base: Path, tmp: Path) -> dict[str, tuple[list[str], str]]:
    """Mistakes of a user: the arguments of the command, and a text that the error message must contain."""
    hf = str(folder)
    ask = ["generate", hf, "--max-seq-len", "64", "--max-gen-len", "4"]
    (tmp / "broken.json").write_text("{")
    (tmp / "latin.txt").write_bytes(b"caf\xe9")
    (tmp / "empty").mkdir()
    return {
        "no such folder": (["info", "nowhere/at/all"], "nowhere/at/all"),
        "no checkpoint": (["verify", str(tmp / "empty")], "no checkpoint"),
        "a file": (["info", str(folder / "config.json")], "config.json"),
        "no such prompt file": ([*ask, "--prompt-file", "absent.txt"], "absent.txt: No such file"),
        "prompt not UTF-8": ([*ask, "--prompt-file", str(tmp / "latin.txt")], "latin.txt: not UTF-8"),
        "empty prompt": ([*ask, "--prompt", ""], "is empty"),
        "no lines": ([*ask, "--lines"], "--lines"),
        "two streamed": ([*ask, "--prompt", "a", "--prompt", "b", "--stream"], "--stream"),
        "a system message alone": ([*ask, "--prompt", "a", "--system", "b"], "--system: a system message is part"),
        "max_gen_len 0": ([*ask, "--prompt", "a", "--max-gen-len", "0"], "--max-gen-len"),
        "temperature": ([*ask, "--prompt", "a", "--temperature=-1"], "--temperature"),
        "top_p": ([*ask, "--prompt", "a", "--temperature=1", "--top-p=1.5"], "--top-p"),
        "top_k": ([*ask, "--prompt", "a", "--top-k=-2"], "--top-k: got -2, but"),
        "a penalty": ([*ask, "--prompt", "a", "--frequency_penalty=3"], "--frequency-penalty: got 3.0, but"),
        "logprobs without json": ([*ask, "--prompt", "a", "--logprobs=1"], "--logprobs: they come in the lines"),
        "not a number": ([*ask, "--prompt", "a", "--temperature=nan"], "--temperature"),
        "empty stop": ([*ask, "--prompt", "a", "--stop", ""], "--stop"),
        "llama_type": ([*ask, "--prompt", "a", "--llama-type", "llama"], "llama_type"),
        "text only": ([*ask, "--prompt", "a", "--with-visual"], "with_visual"),
        "broken config": ([*ask, "--prompt", "a", "--llama-config", str(tmp / "broken.json")], "broken.json"),
        "no tokenizer": ([*ask, "--prompt", "a", "--tokenizer-path", str(tmp / "empty")], "tokenizer"),
        "no such device": ([*ask, "--prompt", "a", "--device", "cuda:99"], "cuda:99"),
        "nonsense device": ([*ask, "--prompt", "a", "--device", "toaster"], "toaster"),
        "another device": ([*ask, "--prompt", "a", "--device", "meta"], "meta"),
        "max_gen_len of a chat": (["chat", hf, "--max-seq-len", "64", "--max-gen-len=-1"], "--max-gen-len: got -1"),
        "a seed of 73 bits": ([*ask, "--prompt", "a", "--seed", "9" * 22], "--seed: got 9999999999999999999999, but"),
        "a seed of upcycle": (["upcycle", hf, str(tmp / "x"), "--seed", "9" * 22], "seed: got 9999999999999999999999"),
        "max_seq_len": ([*ask[:2], "--max-seq-len", "100000000", "--prompt", "a"], "max_seq_len: got 100000000, but"),
        "too many ranks": ([*ask, "--prompt", "a", "--n-gpus", "99", "--device", "cpu"], "ranks, 99"),
        "no such image": ([*ask, "--prompt", "a", "--image", "absent.png"], "absent.png"),
        "a folder of prompts": ([*ask, "--prompt-file", str(tmp / "empty")], "empty: Is a directory"),
        "no such device to quantise on": (
            ["quantize", hf, str(tmp / "x"), "--quant", "int8", "--device", "cuda:99"],
            "--device: got 'cuda:99'",
        ),
        "no such device to merge on": (
            ["merge", hf, hf, str(tmp / "x"), "--device", "cuda:99"],
            "--device: got 'cuda:99'",
        ),
        "max_gen_len of the demo": (["demo", "--dir", str(tmp / "x"), "--max-gen-len", "0"], "max_gen_len: got 0"),
        "own template": (["chat", hf, "--template", "tokenizer"], "template"),
        "into itself": (["convert", hf, hf, "--to", "hf", "--overwrite"], "source"),
        "not empty": (["convert", hf, str(base), "--to", "base"], "not empty"),
        "indivisible": (["convert", hf, str(tmp / "x"), "--to", "base", "--shards", "3"], "num_experts"),
        "torrent in shards": (["convert", hf, str(tmp / "x"), "--to", "torrent", "--shards", "2"], "torrent"),
        "upcycle a mixture": (["upcycle", hf, str(tmp / "x")], "mixture"),
        "no experts": (["upcycle", hf, str(tmp / "x"), "--experts", "0"], "experts"),
    }


def test_a_mistake_is_one_line_and_status_1(folder, base, capsys, tmp_path, monkeypatch):
    capsys.readouterr()
    wrong = {}
    for name, (command, word) in mistakes(folder, base, tmp_path).items():
        standard_input(monkeypatch, "\n")
        status = main(command)
        captured = capsys.readouterr()
        if status != 1 or not ONE_ERROR.fullmatch(captured.err) or word not in captured.err or captured.out:
            wrong[name] = (status, captured)
    assert not wrong
    assert not (tmp_path / "x").exists()


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    missing = str(tmp_path / "missing")
    done = program("info", missing)
    assert done.returncode == 1
    assert ONE_ERROR.fullmatch(done.stderr)
    assert missing in done.stderr


def test_debug_lets_the_traceback_through(tmp_path):
    with pytest.raises(ValueError, match="no such"):
        main(["info", str(tmp_path / "missing"), "--debug"])


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch, folder):
    monkeypatch.setattr("accessory.convert.info.info", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info", str(folder)])


WITHOUT_TORCH = """
import sys
from accessory.cli import main
try:
    status = main({!r})
except SystemExit as ended:
    status = ended.code
sys.exit(f"imported torch, {{status}}" if "torch" in sys.modules else status)
"""


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "usage"),
        (["info", "FOLDER"], 0, "complete        yes"),
        (["info", "nowhere"], 1, "nowhere: no such file or folder"),
        (["plan", "FOLDER", "--card", "H100"], 0, "GB"),
        (["generate", "nowhere", "--prompt", "a"], 1, "nowhere: no such file or folder"),
        (["chat", "FOLDER", "nowhere"], 1, "nowhere: no such file or folder"),
        (["convert", "nowhere", "x", "--to", "hf"], 1, "nowhere: no such file or folder"),
        (["verify", "FOLDER", "nowhere"], 1, "nowhere: no such file or folder"),
        (["merge", "FOLDER", "nowhere", "x"], 1, "nowhere: no such file or folder"),
        (["quantize", "nowhere", "x", "--quant", "int8"], 1, "nowhere: no such file or folder"),
        (["upcycle", "nowhere", "x"], 1, "nowhere: no such file or folder"),
        (["adapter", "export", "FOLDER", "x", "--base", "nowhere"], 1, "nowhere: no such file or folder"),
        (["finetune", "nowhere"], 1, "nowhere: no such file, and no recipe"),
        (["finetune", "lora_one_gpu", "lora_ran=5"], 1, "lora_ran"),
        (["report", "nowhere"], 1, "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_tensor_imports_no_torch(words, status, said, folder):
    words = [str(folder) if word == "FOLDER" else word for word in words]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH.format(words)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, "imported torch" in done.stderr) == (status, False), done.stderr
    assert said in done.stdout + done.stderr


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 69.24 GiB. GPU 0 has …\nlong explanations"),
        RuntimeError("[…] DefaultCPUAllocator: can't allocate memory: you tried to allocate 69.24 GiB. Error code 12"),
    ],
    ids=["GPU", "CPU"],
)
@pytest.mark.parametrize("where", ["accessory.model.meta.build", "accessory.nn.decoder.Decoder.forward"])
def test_out_of_memory_says_what_was_asked_for_and_what_needs_less(where, error, monkeypatch, folder, capsys):
    def full(*args, **how):
        raise error

    monkeypatch.setattr(where, full)
    ask = ["generate", str(folder), "--prompt", "a", "--prompt", "b", "--max-gen-len", "300", "--device", "cpu"]
    assert main(ask) == 1
    err = capsys.readouterr().err
    assert ONE_ERROR.fullmatch(err)
    assert "69.24 GiB more were asked for; a model with" in err
    assert "tokens of prompt and answer" in err


@pytest.mark.parametrize("command", ["quantize", "merge"])
def test_commands_without_a_plan_say_what_ran_out(command, monkeypatch, folder, capsys, tmp_path):
    def full(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …")

    monkeypatch.setattr("accessory.commands.quantize.quantize_checkpoint", full)
    monkeypatch.setattr("accessory.commands.adapters.merge_folders", full)
    words = ["--quant", "int8", "--device", "cpu"] if command == "quantize" else []
    assert main([command, str(folder), str(tmp_path / "out"), *words]) == 1
    err = capsys.readouterr().err
    assert ONE_ERROR.fullmatch(err)
    assert "2.50 GiB more were asked for" in err
    assert "needs less there" in err


def test_a_request_that_the_cache_cannot_hold_is_refused_before_a_step(monkeypatch, folder, capsys, tmp_path):
    """The cache takes half of the memory that is free on a CPU, however long sequences may be."""
    from helpers.checkpoints import ARGS

    from accessory.launch.memory import HOST, Room

    page = 2 * ARGS.n_layers * 64 * ARGS.n_kv_heads * ARGS.head_dim * 2  # bf16
    monkeypatch.setattr("accessory.engine.runner.room_for", lambda *_: Room(20 * page, HOST))
    monkeypatch.setattr("accessory.model.memory.ModelMemory.step_bytes", lambda *_: 0)
    monkeypatch.setattr("accessory.nn.decoder.Decoder.forward", None)
    (tmp_path / "long.json").write_text('{"max_seq_len": 1000000000000}')  # else so long a context is refused before
    ask = ["generate", str(folder), "--prompt", "a", "--max-seq-len", "1000000000000", "--device", "cpu",
           "--llama-config", str(tmp_path / "long.json")]  # fmt: skip
    assert main([*ask, "--max-gen-len", "999999999990"]) == 1
    err = capsys.readouterr().err
    assert ONE_ERROR.fullmatch(err)
    assert "an answer of 999999999990 need 15625000000 pages of 64 tokens, but the cache has 9" in err


def test_a_model_larger_than_the_machine_is_refused_before_it_is_loaded(monkeypatch, folder, capsys):
    from accessory.launch.memory import HOST, Room

    monkeypatch.setattr("accessory.model.memory.room_for", lambda *_, **__: Room(1000, HOST))
    monkeypatch.setattr("accessory.model.meta.build", None)
    assert main(["generate", str(folder), "--prompt", "a", "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert ONE_ERROR.fullmatch(err)
    assert "memory: a model with 1 × 2 tokens" in err
    assert "this machine has 1e-06 GB" in err


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["fly"],
        ["generate"],
        ["generate", "x", "--max-gen-len", "many"],
        ["generate", "x", "--dtype", "int3"],
        ["convert", "a", "b"],
        ["convert", "a", "b", "--to", "onnx"],
        ["chat", "x", "--template", "fancy"],
        ["info"],
        ["info", "a", "--unknown"],
    ],
)
def test_a_command_that_cannot_be_read_is_status_2(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_traceback(folder):
    command = f"{sys.executable} -m accessory info {folder} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""


# --------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_comes_within_half_a_second(command):
    """Takes the median of three runs. On a busy machine, processor time counts instead of elapsed time."""
    elapsed, computed = [], []
    while len(elapsed) < 3:
        started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = program(*command, "--help")
        elapsed.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        computed.append(after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: accessory")
        if len(elapsed) == 2 and max(*elapsed, *computed) < 0.5:
            break  # the median is no longer than the second
    busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    assert statistics.median(computed if busy else elapsed) < 0.5


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom accessory.cli import main\n"
        f"for words in ([], *([name] for name in {COMMANDS})):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        "print({'torch', 'numpy', 'yaml', 'rich', 'tqdm', 'safetensors', 'tokenizers',"
        " 'prompt_toolkit'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_version(capsys):
    import accessory

    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"accessory {accessory.__version__}\n"
