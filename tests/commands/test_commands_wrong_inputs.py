"""Wrong inputs over all commands: one line each, at once, and nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.command_line import program, write_hf

from accessory.cli import main

SECONDS = 2.0  # of this process's time, within which a command says what is wrong
ONE_LINE = re.compile(r"accessory[a-z ]*: error: [^\n]+\n")


class Touch:
    """Pickled, it runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def set_key(folder: Path, **keys) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a good model `hf`, and everything that can be wrong with one."""
    root = tmp_path_factory.mktemp("wrong")
    write_hf(root / "hf")
    assert main(["convert", str(root / "hf"), str(root / "base"), "--to", "base"]) == 0

    def copy(name: str, source: str = "hf") -> Path:
        return shutil.copytree(root / source, root / name)

    def weights(name: str, source: str = "hf") -> Path:
        return next(p for p in sorted(copy(name, source).iterdir()) if p.suffix in (".safetensors", ".pth"))

    (root / "empty").mkdir()
    (copy("listed") / "config.json").write_text("[1, 2]")
    (copy("quoted") / "config.json").write_text("{'a': 1}")
    (copy("utf16") / "config.json").write_text('{"a": 1}', encoding="utf-16")
    set_key(copy("text_size"), hidden_size="64")
    set_key(copy("no_layers"), num_hidden_layers=-1)
    set_key(copy("many_experts"), num_experts_per_tok=99)
    file = weights("cut")
    file.write_bytes(file.read_bytes()[:-100])
    weights("huge_header").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    weights("hollow").write_bytes(b"")
    file = weights("cut_pth", "base")
    file.write_bytes(file.read_bytes()[:1000])
    weights("code", "base").write_bytes(pickle.dumps({"model": Touch()}))
    (file := weights("pipe")).unlink()
    os.mkfifo(file)
    (root / "loop").mkdir()
    (root / "loop/config.json").symlink_to("config.json")
    (copy("broken_tokenizer") / "tokenizer.model").write_bytes(b"garbage")
    for path in copy("no_tokenizer").glob("token*"):
        path.unlink()
    files = {
        "file.txt": "just text",
        "latin.txt": "größe".encode("latin-1"),
        "blank.txt": "\n\n",
        "bytes.bin": bytes(range(256)) * 8,
        "half.json": "{",
        "unknown.json": '{"dimm": 3}',
        "list.json": "[]",
        "type.json": '{"dim": "x"}',
        "good.jsonl": '{"instruction": "a", "input": "", "output": "b c"}\n' * 4,
        "half.jsonl": '{"instruction": "a", "output": "b"}\n{"instruction": \n',
        "plain.jsonl": '1\n"x"\nnull\n',
        "types.jsonl": '{"instruction": 3, "output": ["x"]}\n',
        "hollow.jsonl": '{"instruction": "a", "output": " "}\n',
        "deep.json": "[" * 100_000,
        "garbage.parquet": b"PAR1garbagePAR1",
        "ab.csv": "a,b\n1,2\n",
        "latin.csv": "instruction,output\ngröße,x\n".encode("latin-1"),
        "roles.jsonl": '{"messages": [{"role": "wizard", "content": "x"}]}\n',
        "image.jsonl": '{"image": "no.png", "instruction": "a", "output": "b"}\n',
        "misspelt.yaml": "META:\n  - path: good.jsonl\n    typ: text\n",
        "missing.yaml": "META:\n  - path: nowhere.jsonl\n",
        "list.yaml": "- a\n- b\n",
        "tab.yaml": "META:\n\t- path: x\n",
        "null.yaml": b"META: \x00\x01",
        "void.yaml": "",
        "itself.yaml": "META:\n  - path: itself.yaml\n",
        "peft/adapter_config.json": "nope",
        "peft_negative/adapter_config.json": '{"r": -1, "peft_type": "LORA"}',
        "peft_hollow/README": "",
        "run_hollow/README": "",
        "run_garbage/metrics.jsonl": b"\xff\xfe garbage\n{}\n",
        "run_lists/metrics.jsonl": "[1,2]\n3\n",
    }
    for stem in ("good", "half", "plain", "types", "hollow", "deep", "garbage", "ab", "latin", "roles", "image"):
        name = next(n for n in files if n.startswith(f"{stem}.") and not n.endswith((".txt", ".yaml")))
        name = {"half": "half.jsonl", "latin": "latin.csv"}.get(stem, name)
        files[f"{stem}.yaml"] = f"META:\n  - path: {name}\n"
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def told(capsys, words: list[str]) -> tuple[int, str, str]:
    begin = time.process_time()
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    took = time.process_time() - begin
    out, err = capsys.readouterr()
    assert "Traceback" not in err + out
    assert took < SECONDS
    return status, out, err


def listed(folder: Path) -> dict[str, int]:
    """Every file and folder with its time, to see what a command wrote."""
    return {str(p): p.lstat().st_mtime_ns for p in folder.rglob("*")}


GENERATE = """
nowhere | file.txt | empty | listed | quoted | utf16 | text_size | no_layers | many_experts | cut | huge_header
hollow | cut_pth | code | pipe | loop | broken_tokenizer | no_tokenizer | hf://no | hf:// | hf nowhere | bytes.bin
hf --llama-config nowhere.json | hf --llama-config half.json | hf --llama-config unknown.json
hf --llama-config list.json | hf --llama-config type.json | hf --tokenizer-path nowhere
hf --tokenizer-path file.txt | hf --llama-type llama | hf --llama-type mixtral_ens5 --with-visual | hf --gpu-ids 5
hf --gpu-ids 0 0 | hf --device tpu | hf --device cuda:x | hf --device cuda:77 | hf --device meta
hf --image file.txt | hf --image nowhere.png | hf --system you | hf --temperature nan | hf --temperature -1
hf --top-p 0 | hf --top-p 2 | hf --max-gen-len 0 | hf --max-gen-len -5 | hf --max-gen-len 100000 | hf --stop=
hf --n-gpus 0 | hf --n-gpus 3 --device cpu | hf --n-gpus 99 --device cpu
hf --n-gpus 2 --device cpu --master-addr nosuchhost.invalid | hf --quant int9 | hf --quant int4 --device cpu
hf --dtype fp64 | hf --seed -1 | hf --seed 99999999999999999999999 | hf --seed 1.5 | hf --max-seq-len 1
hf --max-seq-len 100000000 | hf --master-port 99999999 | hf --master-port -4 | hf --template nope | hf --promt y
hf --adapter hf | hf --adapter =hf | hf --adapter a= | hf --adapter a=nowhere | hf --adapter a=hf --adapter a=hf
hf --adapter none=hf | hf --use-adapter a | hf --adapter a=hf --use-adapter b
hf --adapter a=hf --use-adapter a --use-adapter a --use-adapter a
"""
OTHERS = """
genrate hf | generate | generate hf --prompt-file empty | generate hf --prompt-file latin.txt
generate hf --prompt-file nowhere | generate hf --prompt-file bytes.bin
generate hf --prompt-file blank.txt --lines | chat nowhere | chat hf --image nowhere.png | chat hf --template nope
chat hf --temperature nan | convert nowhere d --to hf | convert hf base --to base | convert hf hf --to hf
convert hf file.txt --to base | convert hf file.txt/x --to base | convert hf /proc/nope/x --to base
convert hf d --to base --shards 0 | convert hf d --to base --shards 3 | convert hf d --to base --shards -1
convert hf d --to base --shards 1000 | convert hf d --to torrent --shards 2 | convert hf d --to nope
convert cut d --to base | convert huge_header d --to base | convert code d --to hf
convert hf d --to base --config nowhere.json | convert hf d --to base --dtype int8 | verify nowhere
verify hf nowhere | info nowhere | info file.txt | info empty | info loop | quantize nowhere d --quant nf4
quantize hf d --quant none | quantize hf d --quant int4 --calibrate nowhere
quantize hf d --quant int4 --calibrate blank.txt | quantize hf d --quant int4 --calibrate bytes.bin
quantize hf d --quant int4 --calibrate file.txt --calibrate-tokens 0 | quantize hf file.txt/x --quant nf4
quantize hf d --quant nf4 --device cuda:77 | quantize hf hf --quant nf4 --overwrite | plan nowhere
plan 8x7b --card nope | plan 8x7b --gpus 0 | plan 8x7b --gpus -2 | plan 8x7b --max-seq-len -1 | plan listed
plan file.txt | upcycle nowhere d | upcycle hf d | upcycle bytes.bin d | upcycle hf d --experts 0
upcycle hf d --noise nan | upcycle hf d --seed 99999999999999999999999 | upcycle hf d --top-k 9 | merge hf d
merge hf hf | merge nowhere hf d | merge hf nowhere d | merge hf base d | merge hf empty d
adapter export hf d --base hf | adapter import peft d --base hf | adapter import peft_negative d --base hf
adapter import peft_hollow d --base hf | adapter import nowhere d --base hf | adapter import peft d --base nowhere
adapter sideways peft d --base hf | finetune nowhere | finetune file.txt | finetune list.yaml | finetune tab.yaml
finetune null.yaml | finetune void.yaml | finetune latin.txt | finetune lora_one_gpu
finetune lora_one_gpu nonsense | finetune empty | data check nowhere.yaml --model hf
data check misspelt.yaml --model hf | data check missing.yaml --model hf | data check list.yaml --model hf
data check tab.yaml --model hf | data check null.yaml --model hf | data check void.yaml --model hf
data check itself.yaml --model hf | data check good.yaml --model nowhere | data check good.yaml --model file.txt
data check good.yaml --model hf --max-words 0 | data check good.yaml --model hf --epochs nan
data check good.yaml --model hf --gpus 0 | data check good.yaml --model hf --batch-size -1
data check good.yaml --model hf --tokens-per-second 0 | data check good.yaml --model hf://nope | report nowhere
report file.txt | report run_hollow | report run_garbage | report run_lists | demo --dir file.txt
demo --max-gen-len 0 | demo --max-gen-len -3 | demo --question=
"""
RECIPE = {
    "pretrained_path": "hf",
    "data_config": "good.yaml",
    "output_dir": "out",
    "max_words": "64",
    "max_steps": "1",
    "device": "cpu",
    "batch_size": "1",
}
SETTINGS = """
data_config=nowhere.yaml data_config=misspelt.yaml data_config=missing.yaml data_config=image.yaml
data_config=hollow.yaml data_config=half.yaml output_dir=file.txt/x output_dir=file.txt lr=-1 lr=nan lr=abc
epochs=nan epochs=-1 max_words=0 max_words=1 lora_rank=-1 lora_rank=abc lora_rank=1000000000 batch_size=0
warmup_epochs=-1 clip_grad=nan seed=99999999999999999999999 device=cuda:77 device=tpu precision=fp7
model_parallel_size=3 model_parallel_size=0 loggers=nope pretrained_path=nowhere pretrained_path=cut
pretrained_path=code quant=int9 lrr=1 data_parallel=zzz tokenizer_path=nowhere template=nope resume=nowhere
save_interval=-1 max_steps=0 accum_iter=0 weight_decay=nan min_lr=1 n_gpus=3
"""


def words_of(text: str) -> list[str]:
    return [part.strip() for line in text.splitlines() for part in line.split("|") if part.strip()]


COMMANDS = [f"generate {words} --prompt x" for words in words_of(GENERATE)] + words_of(OTHERS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_input_is_one_line_and_leaves_nothing(here, capsys, monkeypatch, command):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    check(here, capsys, command.split())


def test_names_that_no_file_can_have(here, capsys):
    check(here, capsys, ["info", "n" * 300])
    check(here, capsys, ["convert", "hf", "n" * 300, "--to", "base"])
    check(here, capsys, ["generate", "hf", "--prompt", ""])


def test_names_that_are_no_text(here):
    done = program("info", "\udcff\udcfe")
    assert done.returncode == 1
    assert done.stderr.startswith("accessory: error: \\udcff\\udcfe: no such file or folder")
    done = program("convert", str(here / "hf"), str(here / "\udcff"), "--to", "base")
    shutil.rmtree(here / "\udcff")
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0)


def test_a_folder_that_cannot_be_made_stops_a_run(here, capsys):
    recipe = RECIPE | {"output_dir": "/proc/nope/x"}
    check(here, capsys, ["finetune", "lora_one_gpu", *(f"{k}={v}" for k, v in recipe.items())])


@pytest.mark.parametrize("setting", SETTINGS.split())
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_wrong_setting_of_a_finetune_is_found_by_run_and_dry_run(here, capsys, setting, dry):
    recipe = dict(RECIPE) | {key: value for key, _, value in [setting.partition("=")]}
    check(here, capsys, ["finetune", "lora_one_gpu", *(f"{k}={v}" for k, v in recipe.items()), *dry])


def check(here: Path, capsys, words: list[str]) -> None:
    before = listed(here)
    status, _, err = told(capsys, words)
    assert status in (1, 2)
    assert ONE_LINE.fullmatch(err) if status == 1 else ONE_LINE.fullmatch(err.splitlines()[-1] + "\n"), err
    assert listed(here) == before


SURVEYS = """
info cut | info huge_header | info code | info cut_pth | info quoted | info utf16 | info bytes.bin | verify hf cut
verify hollow | verify code | data check half.yaml --model hf | data check plain.yaml --model hf
data check types.yaml --model hf | data check deep.yaml --model hf | data check garbage.yaml --model hf
data check ab.yaml --model hf | data check latin.yaml --model hf | data check roles.yaml --model hf
data check image.yaml --model hf | data check hollow.yaml --model hf
"""


@pytest.mark.parametrize("command", words_of(SURVEYS))
def test_what_surveys_a_folder_or_data_reports_what_is_wrong(here, capsys, command):
    before = listed(here)
    status, out, err = told(capsys, command.split())
    assert status == (0 if command.startswith("info") and "bytes" not in command else 1)
    assert out or ONE_LINE.fullmatch(err)
    assert listed(here) == before
    assert not (here / "owned").exists()


# --------------------------------------------------------------------------- interrupted at any moment

INTERRUPTED = {
    "convert": "convert hf d --to sparse --shards 2",
    "quantize": "quantize hf d --quant int8",
    "generate": "generate hf --prompt x --max-gen-len 200 --max-seq-len 256 --device cpu",
    "finetune": "finetune lora_one_gpu pretrained_path=hf data_config=good.yaml output_dir=d max_words=64 epochs=200 "
    "device=cpu batch_size=1 save_interval=5",
    "demo": "demo --dir d",
}


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *(
            pytest.param(
                name, signal.SIGINT, id=f"Ctrl-C-{name}",
                marks=pytest.mark.long if name in ("demo", "quantize") else pytest.mark.slow,
            )
            for name in INTERRUPTED
        ),
        # Of the commands here, finetuning alone does something of its own at SIGTERM.
        *(
            pytest.param(
                name, signal.SIGTERM, id=f"SIGTERM-{name}",
                marks=pytest.mark.slow if name == "finetune" else pytest.mark.long,
            )
            for name in INTERRUPTED
        ),
    ],
)  # fmt: skip
def test_a_command_that_is_interrupted_at_any_moment_ends_cleanly(place, name, number):
    """From before Python has started until after the end. What is written is whole or marked as unfinished."""
    for moment in torch.linspace(0.6, 4.0, 6).tolist():
        shutil.rmtree(place / "d", ignore_errors=True)
        begin = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "accessory", *INTERRUPTED[name].split()],
            cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        time.sleep(moment)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert time.monotonic() - begin - moment < 25
        if process.returncode in (130, 1, 0):  # else the signal came before Python could handle it
            assert "Traceback" not in err, (moment, err)
        else:
            assert process.returncode == -number, (moment, err)
        written = [p for p in (place / "d").rglob("*") if p.is_file() and ".partial" not in str(p)]
        assert all(p.stat().st_size for p in written if p.suffix in (".pth", ".safetensors", ".json")), (
            moment,
            written,
        )
        assert "error" not in err or process.returncode == 1, (moment, out, err)
