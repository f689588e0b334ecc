"""`--json` of commands that print a report: one JSON object on stdout, of what the text tells; errors stay one line."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import checkpoints as make
from helpers.adapters import peft_args, random_adapter, save_adapter
from helpers.checkpoints import random_tensors
from helpers.command_line import write_hf
from helpers.dialogues import dialogue
from helpers.pictures import write_picture

from accessory.checkpoint.folder import open_checkpoint
from accessory.cli import main
from accessory.commands.json_output import print_json
from accessory.data.templates import get_template
from accessory.data.tokenizer import MIXTRAL_TOKENIZER, load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("json") / "hf")


@pytest.fixture
def printed(capsys):
    """Run a command; returns its exit status and the object on stdout."""

    def run(*words: object) -> tuple[int, dict]:
        status = main([*map(str, words)])
        return status, json.loads(capsys.readouterr().out)

    return run


def test_info(folder, printed):
    status, told = printed("info", folder, "--json")
    assert status == 0
    assert (told["layout"], told["llama_type"], told["complete"], told["problems"]) == (
        "hf",
        "mixtral_sparse",
        True,
        [],
    )
    assert told["nbytes"] == sum((folder / name).stat().st_size for name in told["files"])
    tensors = open_checkpoint(folder).tensors
    assert told["parameters"] == sum(math.prod(tensor.shape) for tensor in tensors.values())
    assert 0 < told["active_parameters"] < told["parameters"]
    assert told["config"]["dim"] == json.loads((folder / "config.json").read_text())["hidden_size"]
    assert told["adapter"] is None


def test_info_of_an_adapter(tmp_path, printed):
    adapter = save_adapter(tmp_path / "adapter", random_adapter(), peft_args())
    told = printed("info", adapter, "--json")[1]
    assert told["adapter"]["lora_rank"] == peft_args().lora_rank
    assert told["adapter"]["parameters"] == sum(t.numel() for t in random_adapter().values())
    assert told["parameters"] is None, "those of its model are elsewhere"


def test_verify(folder, printed, capsys, tmp_path):
    assert main(["verify", str(folder)]) == 0
    hash_ = capsys.readouterr().out.split()[-1]
    status, told = printed("verify", folder, "--json")
    assert (status, told["ok"], told["b"], told["differences"]) == (0, True, None, [])
    assert told["a"]["hash"] == hash_
    assert told["a"]["tensors"] == sum(told["a"]["dtypes"].values())
    main(["convert", str(folder), str(tmp_path / "bf16"), "--to", "hf", "--dtype", "bf16", "--no-verify"])
    capsys.readouterr()
    status, told = printed("verify", folder, tmp_path / "bf16", "--json")
    assert (status, told["ok"]) == (1, False)
    assert told["differences"][0].startswith("dtype differs: ")
    assert told["b"]["hash"] not in (hash_, None)


def test_merge(tmp_path, printed):
    tensors = {n: t * 0.1 if t.dim() == 2 else 1 + t * 0.1 for n, t in random_tensors(dtype=torch.float32).items()}
    base = make.write_accessory(tmp_path / "base", tensors, "base", world=2)
    lora = random_adapter()
    for n in (1, 2, 3):
        lora[f"layers.0.feed_forward.experts.2.w{n}.lora_b.weight"].zero_()
    adapter = save_adapter(tmp_path / "adapter", lora, peft_args(norm_tuning=False))
    status, told = printed("merge", base, adapter, tmp_path / "out", "--json")
    assert (status, told["written"], told["verified"]) == (0, str(tmp_path / "out"), True)
    assert told["unchanged_experts"] == {"layers.0": [2]}
    assert {w["name"]: w["state"] for w in told["weights"]} == {
        name.replace("lora_b.", ""): "changed" if bool(b.any()) else "zero"
        for name, b in lora.items()
        if ".lora_b." in name
    }
    name = "layers.0.attention.wq"
    update = lora[f"{name}.lora_b.weight"] @ lora[f"{name}.lora_a.weight"] * peft_args().lora_scale
    (size,) = (w["size"] for w in told["weights"] if w["name"] == f"{name}.weight")
    assert size == pytest.approx(float(update.norm() / tensors[f"{name}.weight"].norm()), rel=1e-4)
    assert 0 < told["certificate"]["exact"]["largest"] <= told["certificate"]["bound"]


def test_data_check(tmp_path, printed):
    talk = dialogue("Hello?", "Hi there.", "And?", "Bye.")
    lines = [{"messages": talk}] * 3 + [{"instruction": "Add.", "input": "1 and 2", "output": "3"}]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "my.yaml").write_text("META:\n- path: my.jsonl\n")
    words = ["data", "check", tmp_path / "my.yaml", "--model", MIXTRAL_TOKENIZER, "--template", "mistral", "--json"]
    status, told = printed(*words, "--tokens-per-second", "2", "--epochs", "2")
    assert (status, told["ok"]) == (0, True)
    tokenizer = load_tokenizer(MIXTRAL_TOKENIZER)
    ids, learnt = get_template("mistral").encode(talk, tokenizer)
    sum_ids, sum_learnt = get_template("mistral").encode(dialogue("Add.\n1 and 2", "3"), tokenizer)
    found = told["data_config"]
    tokens = 3 * len(ids) + len(sum_ids)
    (count,) = found["counts"]
    assert count == {
        "file": str(tmp_path / "my.jsonl"), "type": "text", "items": 4, "of": None, "tokens": tokens, "cut": 0,
        "learnt": 3 * sum(learnt) + sum(sum_learnt), "left_out": 0,
    }  # fmt: skip
    assert found["steps"]["tokens_in_all"] == 2 * tokens
    assert found["steps"]["seconds"] == tokens
    assert found["tokens_of_an_item"]["longest"] == max(len(ids), len(sum_ids))
    assert [piece for piece in found["examples"][0]["pieces"] if piece["learnt"]] == [
        {"text": " Hi there.</s>", "learnt": True},
        {"text": " Bye.</s>", "learnt": True},
    ]
    (tmp_path / "my.jsonl").write_text("{")
    status, told = printed(*words)
    assert (status, told["ok"]) == (1, False)
    (problem,) = told["data_config"]["problems"]
    assert problem.startswith(f"{tmp_path}/my.jsonl:1: not valid JSON (")


def test_data_check_of_images(tmp_path, printed):
    write_picture(tmp_path / "a.png")
    item = {"messages": dialogue("What?", "A cat."), "image": "a.png"}
    (tmp_path / "my.json").write_text(json.dumps([item, item, {"messages": dialogue("Hello?", "Hi.")}]))
    (tmp_path / "my.yaml").write_text(f"META:\n- path: my.json\n  root: {tmp_path}\n")
    told = printed("data", "check", tmp_path / "my.yaml", "--model", MIXTRAL_TOKENIZER, "--json")[1]["data_config"]
    assert told["images"] == {"items": 2, "of": 3, "files": 1, "positions": 0, "left_out": 0}
    assert told["examples"][0]["image"] == str(tmp_path / "a.png")


@pytest.mark.parametrize("words", ["info nowhere", "verify nowhere", "merge nowhere x y", "data check nowhere.yaml"])
def test_an_error_is_one_line_beside_an_empty_stdout(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*words.split(), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("accessory: error: nowhere")
    assert captured.err.count("\n") == 1


def test_what_json_has_no_number_for_is_null(capsys):
    print_json({"a": [math.inf, 1.5, {3: math.nan}]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [None, 1.5, {"3": None}]}


def test_timing_of_answers(folder, printed, capsys):
    words = ["generate", folder, "--dtype", "fp32", "--max-seq-len", "128", "--prompt", "One", "--max-gen-len", "6"]
    told = printed(*words, "--json", "--timing")[1]
    assert told["tokens_per_second"] == pytest.approx(told["tokens"] / told["seconds"])
    assert 0 < told["seconds"] < 60
    assert (told["tokens"], told["finish_reason"]) == (6, "length")
    plain = printed(*words, "--json")[1]
    assert plain == {name: value for name, value in told.items() if name not in ("seconds", "tokens_per_second")}
    assert main([*map(str, words), "--timing"]) == 1
    assert "--timing: it comes in the lines of --json" in capsys.readouterr().err
