"""`accessory demo --finetune`: its training data, and a run on a tiny network. `test_outputs.py` runs the real one."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from helpers.runs import without_charts
from hypothesis import given
from hypothesis import strategies as st

from accessory.cli import main
from accessory.demos import corpus, finetune, first_run
from accessory.errors import InputError
from accessory.model.meta import MetaModel
from accessory.train.config import FinetuneConfig
from accessory.train.metrics import read_metrics

pytest.importorskip("gguf")
from helpers.small_gguf import write_small_gguf

FILES = {
    "ai": """
categories: [AI]
conversations:
- - Are you sentient?
  - Sort of
- - Are you sentient?
  - "In all probability,   I am not."
- - are you SENTIENT
  - Would you like me to be?
- - Can you breathe
  - no. I am made of metal not flesh.
- - Where are you
  - >-
    I am in so very many places at one and the same time that I could not possibly count them
- Lost bracket
- 42
""",
    "emotion": """
conversations:
- - Do you ever get lonely
  - I am on the Internet.
  - I do not.
  - Do you?
""",
    "food": """
conversations:
- - why can you not eat
  - I'm a computer. I can't.
- - Who is next?
  - Nobody
  - What comes then?
  - Nothing
""",
    "botprofile": """
conversations:
- - What is your mood?
  - Serene
""",
}


@pytest.fixture
def folder(tmp_path):
    for name in corpus.SUBJECTS:
        (tmp_path / f"{name}.yml").write_text(FILES.get(name, "conversations: []\n"), encoding="utf-8")
    return tmp_path


# --------------------------------------------------------------------------- what it learns from


def test_pairs_are_questions_with_brief_statements(folder):
    assert corpus.pairs(folder) == [
        ("Are you sentient?", "Sort of."),
        ("Are you sentient?", "In all probability, I am not."),
        ("Can you breathe", "No. I am made of metal not flesh."),
        ("What is your mood?", "Serene."),
        ("Do you ever get lonely", "I am on the Internet."),
        ("Do you ever get lonely", "I do not."),
        ("why can you not eat", "I'm a computer. I can't."),
        ("Who is next?", "Nobody."),
    ]


QUESTIONS = st.text("abAB ?!.", min_size=1, max_size=4)


@given(st.lists(st.tuples(QUESTIONS, QUESTIONS), max_size=30), st.lists(QUESTIONS, max_size=2), st.floats(0, 1))
def test_no_question_is_both_learnt_and_held_out(pairs, held_out, share):
    learnt, kept = corpus.split(pairs, held_out, share, seed=1)
    assert sorted(learnt + kept) == sorted(pairs)

    def spelled(some):
        return {" ".join(re.sub(r"[^a-z ]", " ", q.lower()).split()) for q, _ in some}

    assert not spelled(learnt) & spelled(kept)
    assert not spelled(learnt) & spelled([(q, "") for q in held_out])
    assert corpus.split(list(pairs), held_out, share, seed=1) == (learnt, kept)


def test_a_share_is_held_out():
    many = [(f"question {n}", "a") for n in range(100)]
    learnt, kept = corpus.split(many, ["Question 3?"], 0.1, seed=0)
    assert len(kept) == 11
    assert ("question 3", "a") in kept
    assert kept != sorted(kept)
    assert corpus.split(many, ["Question 3?"], 0.1, seed=1)[1] != kept
    assert learnt != sorted(learnt)


def test_a_dialogue_a_line():
    lines = corpus.as_json_lines([("Is it “so”?", "It is."), ("a\nb", "c")]).splitlines()
    assert [json.loads(line)["messages"] for line in lines] == [
        [{"role": "user", "content": "Is it “so”?"}, {"role": "assistant", "content": "It is."}],
        [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}],
    ]
    assert "“so”" in lines[0]


@pytest.mark.parametrize("content", ["conversations: [", "- 1", "nothing: 1", "conversations: 3", None])
def test_what_is_no_corpus_is_named(folder, content):
    path = folder / "food.yml"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=r"food\.yml: not a file of chatterbot-corpus") as told:
        corpus.pairs(folder)
    assert "\n" not in str(told.value)


def test_an_empty_corpus_is_an_error(folder):
    for path in folder.iterdir():
        path.write_text("conversations: []")
    with pytest.raises(InputError, match="no question with a brief answer"):
        corpus.pairs(folder)


def test_without_the_corpus_the_pip_line_is_the_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert main(["demo", "--finetune", "--dir", str(tmp_path / "demo")]) == 1
    assert "pip install --no-deps chatterbot-corpus" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


# --------------------------------------------------------------------------- its course


def times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def visible(text: str) -> str:
    """The text without control characters: a random network writes them, but the demo does not print them."""
    return " ".join("".join(c if c.isprintable() else " " * c.isspace() for c in text).split())


@pytest.fixture
def small(folder, monkeypatch):
    write_small_gguf(folder / "small.gguf")
    extra = random.Random(0).choices("abcdefgh", k=400)
    asked = "".join(f"- - {''.join(extra[i : i + 8])}\n  - Brief\n" for i in range(0, 400, 8))
    (folder / "ai.yml").write_text(FILES["ai"].replace("- Lost", asked + "- Lost"))
    monkeypatch.setattr(first_run, "smollm2_gguf", lambda: folder / "small.gguf")
    monkeypatch.setattr(finetune, "corpus_folder", lambda: folder)
    quick = {"max_words": 320, "lr": 0.02, "lora_rank": 4, "epochs": 4.0}
    monkeypatch.setattr(finetune, "RECIPE", finetune.RECIPE | quick)
    monkeypatch.chdir(folder)
    return Path("demo")


def test_it_trains_merges_and_shows_the_difference(small, capsys):
    arguments = ["demo", "--finetune", "--dir", str(small), "--max-gen-len", "6", "--question", "Why [b]?"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    run = small / "finetune" / "run"

    # Loss and steps are those of the run.
    records = read_metrics(run)
    losses = [r["loss"] for r in records if r["kind"] == "eval"]
    steps = [r for r in records if r["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert f"held-out answers: {losses[0]:.2f} before, {losses[-1]:.2f} after {len(steps)} steps: −" in out

    # `accessory finetune` can read the recipe, and the run followed it.
    config = FinetuneConfig.from_yaml(small / "finetune" / "recipe.yaml")
    assert Path(config.output_dir) == run
    assert (run / "report.html").is_file()
    held_out = [json.loads(line) for line in (small / "finetune" / "held_out.jsonl").read_text().splitlines()]
    asked = {item["messages"][0]["content"] for item in held_out}
    assert {"What is your mood?", "Do you ever get lonely", "why can you not eat"} <= asked
    learnt = (small / "finetune" / "train.jsonl").read_text()
    assert not any(json.dumps(question) in learnt for question in asked)

    # The answers before and after are those of the two models.
    prompt = "<|im_start|>user\nWhy [b]?<|im_end|>\n<|im_start|>assistant\n"
    for when, path in (("before", small / "base"), ("after", small / "finetuned")):
        model = MetaModel.from_pretrained(path, max_seq_len=128, device="cpu")
        answer = visible(model.generate([prompt], max_gen_len=6)[0])
        assert answer
        shown = out.partition("> Why [b]?")[2].partition(f"{when}: ")[2].split("\n")[0]
        assert visible(shown) in (answer, f"{answer} …")
    assert re.search(r"of [\d,]+ weights changed", out)

    # A second call trains nothing again.
    before = times(run / "states"), times(small / "base")
    with without_charts():
        assert main(arguments) == 0
    assert (times(run / "states"), times(small / "base")) == before
    assert f"{losses[-1]:.2f} after {len(steps)} steps" in capsys.readouterr().out


def test_a_loss_that_did_not_fall_is_a_failure(small, monkeypatch):
    rises = [{"kind": "eval", "loss": 1.0}, {"kind": "eval", "loss": 1.1}]
    layers = {"entropy": [1.0], "largest": [0.5]}
    monkeypatch.setattr(finetune, "read_metrics", lambda run: [*rises, {"kind": "train", "layers": layers}])
    monkeypatch.setattr(finetune, "RECIPE", finetune.RECIPE | {"max_steps": 1})
    with without_charts():
        assert main(["demo", "--finetune", "--dir", str(small), "--max-gen-len", "1"]) == 1
