"""The command `accessory`: what it prints, its exit statuses, and that a user's mistake is one line."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.random_models import write_speaking
from helpers.sizes import SPEAKING

from accessory.cli import main
from accessory.data.tokenizer import MIXTRAL_TOKENIZER
from accessory.model.meta import MetaModel

ARGS = SPEAKING.replace(max_seq_len=256)
PROMPT = "The best programming language in the world is"
COMMANDS = ("generate", "chat", "convert", "verify", "info", "upcycle", "demo")
ONE_ERROR = re.compile(r"accessory: error: [^\n]+\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a tiny random Mixtral with the real tokenizer."""
    path = tmp_path_factory.mktemp("cli") / "hf"
    write_speaking(path, ARGS)
    return path


@pytest.fixture(scope="module")
def base(folder):
    path = folder.with_name("base")
    assert main(["convert", str(folder), str(path), "--to", "base", "--shards", "2"]) == 0
    return path


@pytest.fixture(scope="module")
def model(folder):
    return MetaModel.from_pretrained(folder, dtype=torch.float32, device="cpu", max_seq_len=128)


@pytest.fixture
def generate(folder, capsys):
    """Run `accessory generate` in this process; returns what it printed."""

    def run(*options: str) -> str:
        assert main(["generate", str(folder), "--dtype", "fp32", "--max_seq_len", "128", *options]) == 0
        return capsys.readouterr().out

    return run


def standard_input(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def program(*words: str, input: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accessory", *words]
    return subprocess.run(command, input=input, capture_output=True, text=True, timeout=timeout, check=False)


# --------------------------------------------------------------------------- generate


def test_generate_prints_what_the_model_writes(generate, model):
    assert generate("--prompt", PROMPT, "--max-gen-len", "8") == model.generate([PROMPT], max_gen_len=8)[0] + "\n"


def test_several_prompts_are_numbered_and_each_gets_what_it_gets_alone(generate, model):
    texts = model.generate([PROMPT, "A"], max_gen_len=6)
    out = generate("--prompt", PROMPT, "--prompt", "A", "--max_gen_len", "6")
    assert out == f"# 1/2: {PROMPT}\n{texts[0]}\n# 2/2: A\n{texts[1]}\n"
    assert generate("--prompt", "A", "--prompt", " \n ", "--max-gen-len", "1").startswith("# 1/2: A\n")


def test_prompts_come_from_files_and_standard_input(generate, model, tmp_path, monkeypatch):
    expected = model.generate([PROMPT], max_gen_len=4)[0]
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    assert generate("--prompt-file", str(tmp_path / "prompt.txt"), "--max-gen-len", "4") == expected + "\n"
    for options in ([], ["--prompt-file", "-"]):
        standard_input(monkeypatch, PROMPT + "\n")
        assert generate(*options, "--max-gen-len", "4") == expected + "\n"


def test_lines_and_json(generate, model, monkeypatch):
    standard_input(monkeypatch, f"{PROMPT}\n\nZwei Wörter\n")
    lines = generate("--lines", "--json", "--max-gen-len", "4").splitlines()
    texts = model.generate([PROMPT, "Zwei Wörter"], max_gen_len=4)
    assert [json.loads(line) for line in lines] == [
        {"prompt": PROMPT, "text": texts[0]},
        {"prompt": "Zwei Wörter", "text": texts[1]},
    ]


def test_stream_prints_the_same_text(generate, model):
    assert generate("--prompt", PROMPT, "--max-gen-len", "20", "--stream") == generate(
        "--prompt", PROMPT, "--max-gen-len", "20"
    )


def test_stop_ends_the_text_before_it(generate, model):
    whole = model.generate([PROMPT], max_gen_len=20)[0]
    stop = whole[len(whole) // 2 :][:3]
    for stream in ([], ["--stream"]):
        out = generate("--prompt", PROMPT, "--max-gen-len", "20", "--stop", "\x00", "--stop", stop, *stream)
        assert out == whole[: whole.index(stop)] + "\n"


def test_a_seed_makes_sampling_repeat(generate):
    hot = ["--prompt", PROMPT, "--max-gen-len", "12", "--temperature", "1.5", "--top_p", "0.9"]
    first, again, other = (generate(*hot, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_either_implementation_and_later_config_files(folder, base, capsys, tmp_path):
    outs = []
    for kind in ("mixtral", "mixtral_sparse"):
        main(["generate", str(base), "--llama_type", kind, "--dtype", "float32", "--prompt", PROMPT, "--max-gen-len=6"])
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]
    (tmp_path / "theta.json").write_text('{"rope_theta": 100}')
    tokenizer = ["--tokenizer_path", str(MIXTRAL_TOKENIZER)]
    options = ["--llama_config", str(tmp_path / "theta.json"), *tokenizer, "--prompt", PROMPT, "--max-gen-len=6"]
    assert main(["generate", str(base), "--dtype", "fp32", *options]) == 0


# --------------------------------------------------------------------------- chat


@pytest.fixture
def chat(folder, model, capsys, monkeypatch):
    """Type lines into `accessory chat`; returns exit status, output, and the prompts that reached the model."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, str, list[str]]:
        standard_input(monkeypatch, "".join(line + "\n" for line in lines))
        prompts = []
        stream = MetaModel.stream_generate

        def recorded(self, prompt, **how):
            prompts.append(self.tokenizer.decode(prompt))
            return stream(self, prompt, **how)

        monkeypatch.setattr(MetaModel, "stream_generate", recorded)
        monkeypatch.setattr(MetaModel, "from_pretrained", lambda *args, **how: model)
        status = main(["chat", str(folder), "--max-gen-len", "3", *options])
        monkeypatch.setattr(MetaModel, "stream_generate", stream)
        return status, capsys.readouterr().out, prompts

    return run


def test_chat_remembers_earlier_turns_until_the_input_ends(chat):
    status, out, prompts = chat("Hello", "", "And now?")
    assert status == 0
    assert out.startswith("Template default.")
    assert len(prompts) == 2
    assert prompts[0].endswith("### Human: Hello\n### Assistant:")
    assert prompts[1].startswith(prompts[0])
    assert prompts[1].endswith("\n### Human: And now?\n### Assistant:")
    answer = prompts[1].removeprefix(prompts[0]).partition("\n###")[0].strip()
    assert answer
    assert answer in out


def test_undo_takes_a_round_back_and_clear_all_of_them(chat):
    status, out, prompts = chat(
        "One", "Two", "/undo", "Three", "/clear", "Four", "/undo", "/undo", "Five", "/quit", "Six"
    )
    assert status == 0
    assert len(prompts) == 5
    assert out.count("(forgotten)") == 4
    assert [("One" in p, "Two" in p) for p in prompts[:3]] == [(True, False), (True, True), (True, False)]
    assert all("One" not in p for p in prompts[3:])
    assert "Four" not in prompts[4]


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("mistral", "[INST] Be brief.\n\nHi [/INST]"),
        ("none", "Be brief.\nHi"),
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("alpaca", "Be brief.\n\n### Instruction:\nHi\n\n### Response:"),
    ],
)
def test_chat_takes_a_template_and_a_system_message(chat, template, prompt):
    status, _, prompts = chat("Hi", "/clear", "Hi", options=("--template", template, "--system", "Be brief."))
    assert (status, prompts) == (0, [prompt, prompt])


def test_ctrl_c_stops_an_answer_and_forgets_its_round(chat, monkeypatch):
    original = MetaModel._stream
    calls = iter(range(10))

    def interrupted(self, *args):
        first = next(calls) == 0
        for item in original(self, *args):
            yield item
            if first:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MetaModel, "_stream", interrupted)
    status, out, prompts = chat("One", "Two")
    assert status == 0
    assert "(stopped; the round is forgotten)" in out
    assert len(prompts) == 2
    assert "One" not in prompts[1]


def test_ctrl_c_between_answers_ends_the_program(chat, monkeypatch, capsys):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert chat()[0] == 130


def test_chat_in_a_pipe(folder):
    done = program("chat", str(folder), "--max-gen-len", "2", "--template", "mistral", input="Hello\n/undo\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert "Template mistral." in done.stdout
    assert "(forgotten)" in done.stdout
    assert "Traceback" not in done.stderr


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
    """What a user may get wrong, and a word that the answer must hold."""
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
        "max_gen_len 0": ([*ask, "--prompt", "a", "--max-gen-len", "0"], "max_gen_len"),
        "temperature": ([*ask, "--prompt", "a", "--temperature=-1"], "temperature"),
        "top_p": ([*ask, "--prompt", "a", "--temperature=1", "--top-p=1.5"], "top_p"),
        "not a number": ([*ask, "--prompt", "a", "--temperature=nan"], "temperature"),
        "empty stop": ([*ask, "--prompt", "a", "--stop", ""], "stop"),
        "llama_type": ([*ask, "--prompt", "a", "--llama-type", "llama"], "llama_type"),
        "text only": ([*ask, "--prompt", "a", "--with-visual"], "with_visual"),
        "broken config": ([*ask, "--prompt", "a", "--llama-config", str(tmp / "broken.json")], "broken.json"),
        "no tokenizer": ([*ask, "--prompt", "a", "--tokenizer-path", str(tmp / "empty")], "tokenizer"),
        "no such device": ([*ask, "--prompt", "a", "--device", "cuda:99"], "cuda:99"),
        "nonsense device": ([*ask, "--prompt", "a", "--device", "toaster"], "toaster"),
        "another device": ([*ask, "--prompt", "a", "--device", "meta"], "meta"),
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
    monkeypatch.setattr("accessory.checkpoint.info.info", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info", str(folder)])


def test_out_of_memory_says_what_needs_less(monkeypatch, folder, capsys):
    def full(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory.\nlong explanations")

    monkeypatch.setattr(MetaModel, "from_pretrained", full)
    assert main(["generate", str(folder), "--prompt", "a"]) == 1
    err = capsys.readouterr().err
    assert ONE_ERROR.fullmatch(err)
    assert "--max-seq-len" in err


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["fly"],
        ["generate"],
        ["generate", "x", "--max-gen-len", "many"],
        ["generate", "x", "--dtype", "int3"],
        ["convert", "a", "b"],
        ["convert", "a", "b", "--to", "gguf"],
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
    """The median of three. On a machine that is busy with other things the processor's time has to stand for it."""
    elapsed, computed = [], []
    for _ in range(3):
        started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = program(*command, "--help")
        elapsed.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        computed.append(after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: accessory")
    busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    assert statistics.median(computed if busy else elapsed) < 0.5


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom accessory.cli import main\n"
        f"for words in ([], *([name] for name in {COMMANDS})):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        "print({'torch', 'numpy', 'yaml', 'rich', 'tqdm', 'safetensors', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_version(capsys):
    import accessory

    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"accessory {accessory.__version__}\n"
