"""`accessory data check`: what it prints, where its settings come from, and that it fails when data is wrong."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.dialogues import dialogue
from helpers.hub_server import Repo, serve
from helpers.pictures import write_picture
from helpers.small_tokenizers import byte_level_folder

from accessory.cli import main
from accessory.commands import data_view, training_speed
from accessory.config import ModelArgs
from accessory.data.bos_check import check_bos
from accessory.data.dataset import FinetuneData
from accessory.data.records import read_yaml
from accessory.data.templates import get_template
from accessory.data.tokenizer import MIXTRAL_TOKENIZER, load_tokenizer
from accessory.train.config import PACKAGE

TALK = {"messages": dialogue("Hello?", "Hi there,\nfriend.", "And?", "Bye.")}
SINGLE = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


@pytest.fixture
def checked(tmp_path, capsys, monkeypatch):
    """Check files, each given as a list of items or of lines; returns the exit status and the output."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*files, options=(), types=None, model=MIXTRAL_TOKENIZER):
        entries = []
        for n, items in enumerate(files):
            lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
            (tmp_path / f"{n}.jsonl").write_text("\n".join(lines))
            entries.append({"path": f"{n}.jsonl", "type": types[n] if types else "text"})
        (tmp_path / "meta.yaml").write_text(yaml.safe_dump({"META": entries}))
        status = main(["data", "check", str(tmp_path / "meta.yaml"), "--model", str(model), *options])
        return status, capsys.readouterr().out

    return run


def row(out, begin):
    (found,) = (line for line in out.splitlines() if line.startswith(begin))
    return found


def test_good_data(checked, mixtral_ids):
    status, out = checked([TALK] * 30, [SINGLE] * 10, types=["chat", "sums"], options=["--epochs", "2", "--gpus", "2"])
    assert status == 0
    length = len(mixtral_ids(TALK["messages"]))
    assert re.search(rf"/0\.jsonl +chat +30 +{30 * length:,} +{length} +0 \(0\.0 %\) +0 +\d+\.\d %\n", out)
    assert re.search(r"/1\.jsonl +sums +10 +", out)
    assert re.search(r"all of +chat +30 ", out)
    assert re.search(r"all +40 +", out)
    assert row(out, "BOS") == "BOS       <s> (id 1) begins each of the 40 items, and is nowhere else"
    assert row(out, "steps").endswith("; 4 in all (2 epochs)"), "a step for each type"
    assert "8 a step (4 a GPU × 1 accumulated × 2 data-parallel)" in out
    assert row(out, "time") == (
        "time      unknown here; give --tokens-per-second (of all GPUs together), or make a few steps of the run: "
        "its metrics.jsonl tells"
    )
    assert out.endswith("nothing is wrong\n")
    assert "⟦ Hi there,↵\nfriend.↵\n###⟧ Human: And?↵\n### Assistant:⟦ Bye.↵\n###⟧" in out
    assert "### Human: Add.↵\n1 and 2↵\n### Assistant:⟦ 3↵\n###⟧" in out
    assert out.count(": learnt is in ⟦⟧") == 4


@pytest.fixture(scope="module")
def mixtral_ids():
    tokenizer = load_tokenizer(MIXTRAL_TOKENIZER)
    return lambda messages: get_template("default").encode(messages, tokenizer)[0]


def test_learnt_is_green_and_control_tokens_are_seen(checked, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    status, out = checked([TALK], options=["--template", "mistral"])
    assert status == 0
    special, rest, learnt, end = "\x1b[1;2;35m", "\x1b[2m", "\x1b[32m", "\x1b[0m"
    begin = f"{special}<s>{end}{rest}[INST] Hello? [/INST]{end}"
    assert f"{begin}{learnt} Hi there,↵{end}\n{learnt}friend.{end}\x1b[1;35m</s>{end}" in out
    assert "⟦" not in out


def test_every_broken_item_is_told(checked, tmp_path):
    bad = [
        '{"messages": [',
        {"messages": [{"role": "robot", "content": "x"}]},
        {"conversations": []},
        {**TALK, "image": str(tmp_path / "no.jpg")},
    ]
    status, out = checked([TALK, *bad, TALK], [TALK], [bad[1]] * 30)
    assert status == 1
    told = [line for line in out.splitlines() if re.match(rf"{tmp_path}/\d\.jsonl:\d+: ", line)]
    first = tmp_path / "0.jsonl"
    assert told[0] == f"{first}:2: not valid JSON (Expecting value at column 15)"
    assert told[1].startswith(f"{first}:3: messages[0]: unknown role 'robot'; known are ")
    assert told[2] == f"{first}:4: messages: the list is empty; give at least one message"
    assert told[3] == f"{first}:5: image: {tmp_path / 'no.jpg'}: no such file"
    assert len(told) == data_view.SHOWN_PROBLEMS
    end = f"… and 14 more\n34 problems: 4 in {first}, 30 in {tmp_path / '2.jsonl'}\n"
    assert out.endswith(end)


def test_one_bad_line_of_many(checked, tmp_path):
    lines = ['{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'] * 5_000
    lines[4_776] = lines[4_776][:-1]
    status, out = checked(lines)
    assert status == 1
    assert f"\n{tmp_path / '0.jsonl'}:4777: not valid JSON (Expecting ',' delimiter at column 87)\n" in out
    assert out.endswith(f"1 problem: 1 in {tmp_path / '0.jsonl'}\n")


def seeing(folder, llama_type="mixtral_ens", **more):
    """A folder without weights whose config has an image encoder: CLIP of 2 × 2 patches, 7 positions a view."""
    folder.mkdir(exist_ok=True)
    shutil.copy(MIXTRAL_TOKENIZER, folder / "tokenizer.model")
    config = {"hidden_size": 8, "patch_size": 7}
    vision = {"encoders": [{"name": "clip", "kind": "clip", "size": 14, "config": config}]}
    sizes = json.loads((PACKAGE / "configs/8x7b.json").read_text())
    (folder / "config.json").write_text(json.dumps(sizes | {"vision": vision}))
    (folder / "meta.json").write_text(json.dumps({"llama_type": llama_type}))
    return folder


def test_images_are_counted_and_shown(checked, tmp_path):
    write_picture(tmp_path / "a.png", 30, 20)
    (tmp_path / "bad.png").write_text("x")
    image = {**TALK, "image": str(tmp_path / "a.png")}
    bad = {**TALK, "image": str(tmp_path / "bad.png")}
    for kind, words in (("mixtral_ens", 7), ("mixtral_sparse_ens5", 35)):
        status, out = checked([image, TALK, image, bad], model=seeing(tmp_path / "model", kind))
        assert status == 1
        (length,) = re.findall(r"0\.jsonl:2 \(text\), (\d+) tokens: learnt", out)
        tokens = 3 * int(length) + 2 * words
        assert row(out, "images") == (
            f"images    3 of 4 items have one, of 2 files; {words} positions each, {200 * words / tokens:.1f} % of all "
            "tokens; 1 items are left out for theirs"
        )
        assert f"0.jsonl:1 (text), {int(length) + words} tokens, image {tmp_path}/a.png (30 × 20): learnt is" in out
        assert f"<s>[image: {words} positions]A chat between" in out
        assert f"\n{tmp_path}/0.jsonl:4: image: {tmp_path}/bad.png: is not an image, or of a format" in out
        assert re.search(rf"/0\.jsonl +text +3 +{tokens} +\d+ +0 \(0\.0 %\) +0 ", out)
        status, out = checked([image, TALK, TALK], model=seeing(tmp_path / "model", kind))
        assert status == 0
    status, out = checked([image, TALK])
    assert (status, row(out, "images")) == (
        0,
        "images    1 of 2 items have one, of 1 files; the positions they take are not counted: --model is no folder of "
        "a model that sees",
    )
    assert f"image {tmp_path}/a.png (30 × 20)" in out


def test_a_run_that_sees_nothing_is_told_of_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    write_picture(tmp_path / "a.png")
    items = [TALK, {**TALK, "image": str(tmp_path / "a.png")}]
    (tmp_path / "0.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "meta.yaml").write_text(yaml.safe_dump({"META": [{"path": "0.jsonl"}]}))
    model = seeing(tmp_path / "model")
    base = {
        "pretrained_path": [str(model)],
        "data_config": str(tmp_path / "meta.yaml"),
        "output_dir": str(tmp_path / "out"),
        "max_words": 256,
    }
    for more, status, told in (
        ({"no_visual": True}, 1, "0.jsonl:2: image: this item has one, and the model looks at none; give a llama_type"),
        ({}, 0, "; 7 positions each, "),
        ({"llama_type": "mixtral_ens5"}, 0, "; 35 positions each, "),
        ({"llama_type": "mixtral"}, 1, "; the run looks at none"),
    ):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(base | more))
        assert main(["data", "check", str(tmp_path / "run.yaml")]) == status
        assert told in capsys.readouterr().out


def test_nothing_but_broken_items(checked):
    status, out = checked([{"messages": []}] * 3)
    assert status == 1
    assert "3 problems: 3 in " in out


def test_long_items(checked):
    long = {"messages": dialogue("q", "a " * 300)}
    late = {"messages": dialogue("q " * 300, "a")}
    status, out = checked(
        [TALK, long, late], options=["--max-words", "100", "--no-packing", "--tokens-per-second", "5"]
    )
    assert status == 0, "they are counted, not refused"
    assert re.search(r"/0\.jsonl +text +2 +\d+ +\d+ +1 \(50\.0 %\) +1 ", out)
    assert "    256 – 511     " in out
    assert "packing   off: one item a row" in out
    (tokens,) = re.findall(r"about 3\d seconds for (\d+) tokens at 5 a second \(as given\)", out)
    assert re.search(rf"/0\.jsonl +text +2 +{tokens} ", out)
    assert ", 100 tokens, cut from " in out


def test_learnt_tokens_are_counted(tmp_path):
    items = [TALK, SINGLE, {"messages": dialogue("q " * 50, "a")}, {"messages": dialogue("q", "a " * 90)}, TALK]
    for name in ("0.jsonl", "1.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, items)))
    meta = {"META": [{"path": str(tmp_path / f"{n}.jsonl"), "type": "text"} for n in (0, 1)]}
    tokenizer = load_tokenizer(MIXTRAL_TOKENIZER)
    for most in (1000, 90, 60):
        data = FinetuneData.open(meta, tokenizer, max_words=most)
        wanted = [sum(data.example(i).learn) for i in range(len(data))]
        assert data.learnt_tokens().tolist() == wanted


def recipe(tmp_path, **fields):
    values = {
        "pretrained_path": str(MIXTRAL_TOKENIZER),
        "data_config": str(tmp_path / "meta.yaml"),
        "output_dir": "out",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, **fields}))
    return str(path)


def test_a_finetunes_choices_count(checked, tmp_path, capsys):
    checked([TALK] * 24, [SINGLE])
    run = tmp_path / "run"
    run.mkdir()
    fields = {"batch_size": 2, "accum_iter": 3, "epochs": 1.5, "max_words": 512, "model_parallel_size": 2}
    path = recipe(tmp_path, **fields, packing=False, eval_data=str(tmp_path / "meta.yaml"), output_dir=str(run))
    assert main(["data", "check", path, "--gpus", "4"]) == 0
    out = capsys.readouterr().out
    assert "items     at most 512 tokens" in out
    assert "12 a step (2 a GPU × 3 accumulated × 2 data-parallel)" in out
    assert "(1.5 epochs)" in out
    assert "eval_data: " in out
    assert out.count("steps     ") == 1
    # Flags override the recipe, and the speed comes from an earlier run.
    records = [{"kind": "train", "step": n + 1, "tokens_per_s": 10.0 * n} for n in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert main(["data", "check", path, "--batch-size", "1", "--epochs", "1", "--packing", "--max-words", "99"]) == 0
    out = capsys.readouterr().out
    assert "items     at most 99 tokens" in out
    assert "packing   on" in out
    assert "3 a step (1 a GPU × 3 accumulated × 1 data-parallel)" in out
    assert f"tokens at 10 a second (the speed of the run in {run})" in out
    assert main(["data", "check", path, "--gpus", "3"]) == 1
    assert "model_parallel_size: got 2, but the number of ranks, 3, must be a multiple" in capsys.readouterr().err


def test_prompts_of_single_turns(checked, tmp_path, capsys):
    status, out = checked([SINGLE], options=["--no-dialog"])
    assert status == 0
    assert "single turns: alpaca" in out
    assert "### Input:↵\n1 and 2↵\n↵\n### Response:⟦3</s>⟧" in out
    assert main(["data", "check", recipe(tmp_path, prompt_type="qg")]) == 0
    assert "Generate a question whose answer is:↵\nAdd.↵\n↵\nQuestion:↵\n⟦3</s>⟧" in capsys.readouterr().out


def test_bos_is_proven(tmp_path, checked):
    plain = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # a chat template that forgot BOS
    folder = byte_level_folder(tmp_path / "model", plain, bos_token="<|endoftext|>", add_bos_token=True)
    status, out = checked([TALK, TALK], options=["--template", "tokenizer"], model=folder)
    assert status == 1
    assert f"{tmp_path}/0.jsonl:2: BOS (<|endoftext|>, id 0) is there 0 times; it must begin the item, once" in out
    assert "BOS       wrong in 2 items" in out
    status, out = checked([TALK], options=["--template", "chatml"], model=folder)
    assert status == 0
    assert "BOS       <|endoftext|> (id 0) begins each of the 1 items" in out
    twice = "{{ bos_token }}{% for m in messages %}{{ bos_token + m['content'] }}{% endfor %}"
    folder = byte_level_folder(tmp_path / "twice", twice, bos_token="<|endoftext|>", add_bos_token=True)
    status, out = checked([TALK], options=["--template", "tokenizer"], model=folder)
    assert "0.jsonl:1: BOS (<|endoftext|>, id 0) is there 5 times" in out


def test_bos_that_nobody_adds(tmp_path):
    tokenizer = load_tokenizer(byte_level_folder(tmp_path / "t"))
    (tmp_path / "a.jsonl").write_text(json.dumps(TALK))
    data = FinetuneData.open({"META": [{"path": str(tmp_path / "a.jsonl")}]}, tokenizer, max_words=400)
    assert check_bos(data, tokenizer, get_template("default")) is None
    assert data_view.bos(data, tokenizer, None) == "BOS       the tokenizer puts none before a text"


def test_the_model_it_is_for(tmp_path, checked, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(MIXTRAL_TOKENIZER, folder / "tokenizer.model")
    sizes = ModelArgs(vocab_size=32000).to_dict()
    (folder / "config.json").write_text(json.dumps(sizes))
    assert checked([TALK], model=folder)[0] == 0
    (folder / "config.json").write_text(json.dumps({**sizes, "vocab_size": 100}))
    assert checked([TALK], model=folder)[0] == 1
    main(["data", "check", str(tmp_path / "meta.yaml"), "--model", str(folder)])
    assert "vocab_size: the network has 100 embedding rows" in capsys.readouterr().err


def test_the_speed_of_a_gpu_makes_an_estimate(tmp_path, checked, capsys, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(MIXTRAL_TOKENIZER, folder / "tokenizer.model")
    args = ModelArgs(vocab_size=32000, dim=64, hidden_dim=64, n_layers=1, n_heads=4, n_kv_heads=2)
    (folder / "config.json").write_text(json.dumps(args.to_dict()))
    assert training_speed._matrix_rate("cpu", 64) > 1e6
    per_token = 6 * args.parameter_counts()[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(training_speed, "_matrix_rate", lambda *_: per_token / training_speed.EFFICIENCY * 10)
    status, out = checked([TALK], model=folder, options=["--gpus", "2"])
    assert status == 0
    assert "tokens at 20 a second (supposing that 2 GPUs like this one, which multiplies at 0 TFLOP/s, keep 35%" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="then the GPU's speed is measured")
def test_without_a_gpu_nothing_is_guessed(checked):
    assert "time      unknown here" in checked([TALK])[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["meta.yaml"], "--model: missing; give a model's folder"),
        (["none.yaml", "--model", "x"], "none.yaml: no such file, and no recipe of that name"),
        (["meta.yaml", "--model", "nowhere"], "nowhere: no such file or folder; looked for"),
        (["meta.yaml", "--model", "x", "--max-words", "0"], "--max-words: got 0, but it must be more than 0"),
        (["meta.yaml", "--model", "x", "--epochs", "-1"], "--epochs: got -1.0, but it must be more than 0"),
        (["other.yaml", "--model", "x"], "other.yaml: neither a list of data (META) nor a finetune's configuration"),
        (
            ["typo.yaml", "--model", str(MIXTRAL_TOKENIZER)],
            "typo.yaml: META[0]: unknown key 'pth'; did you mean 'path'?",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("meta.yaml").write_text("META: [{path: a.jsonl}]")
    Path("typo.yaml").write_text("META: [{pth: a.jsonl}]")
    Path("other.yaml").write_text("a: 1")
    assert main(["data", "check", *words]) == 1
    said = capsys.readouterr().err
    assert said.startswith("accessory: error: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_model_on_the_hub_gives_its_tokenizer_and_sizes_alone(tmp_path, checked, monkeypatch):
    for name, value in {"HUB_CACHE": str(tmp_path / "cache"), "HUB_OFFLINE": False, "HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.HF_{name}", value)
    files = {
        "sub/tokenizer.model": MIXTRAL_TOKENIZER.read_bytes(),
        "sub/config.json": json.dumps(ModelArgs(vocab_size=32000).to_dict()).encode(),
        "sub/model.safetensors": b"not looked at",
        "README.md": b"",
    }
    with serve({"owner/name": Repo(files)}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        status, out = checked([TALK], model="hf://owner/name/sub")
        fetched = {path.rsplit("/", 1)[-1] for path in server.downloads()}
    assert status == 0
    assert "tokenizer.model (sentencepiece, 32,000 ids)" in out
    assert fetched == {"tokenizer.model", "config.json"}


def test_an_action_is_needed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["data"])
    assert ended.value.code == 2
    assert "ACTION" in capsys.readouterr().err


def test_the_lists_that_are_shipped(tmp_path, monkeypatch, capsys):
    """The tutorial runs in the package folder; its data is in a folder next to that."""
    (tmp_path / "accessory").mkdir()
    monkeypatch.chdir(tmp_path / "accessory")
    lists = PACKAGE / "configs" / "data" / "finetune" / "sg"
    wanted = ["data/ultrachat_200k_train_sft.json", "data/evol-codealpaca-v1/wizardCode.json"]
    entries = read_yaml(lists / "dialog_ultrachat200kWizardcode.yaml")["META"]
    assert entries == [{"path": f"../{path}", "type": "text"} for path in wanted]
    talk = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    for path, item in [(wanted[0], talk), (wanted[1], talk), ("data/alpaca_gpt4_data.json", SINGLE)]:
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text(json.dumps([item]))
    for path in sorted(lists.iterdir()):
        assert main(["data", "check", str(path), "--model", str(MIXTRAL_TOKENIZER)]) == 0, path
    assert capsys.readouterr().out.count("nothing is wrong") == len(list(lists.iterdir()))
