"""Finetuning data as a whole: kinds of items, learnt spans, refused items, shares, truncation, and the cache."""

import json
import logging
import os
import re
import threading

import numpy as np
import pytest
from helpers.dialogues import dialogue, learnt
from helpers.pictures import write_picture

from accessory.data import encoding, token_cache
from accessory.data.dataset import FinetuneData
from accessory.data.system_prompt import format_prompt
from accessory.data.templates import get_template
from accessory.errors import InputError, MissingExtraError

TALK = {
    "conversations": [
        {"from": "human", "value": "Hello?"},
        {"from": "gpt", "value": "Hi."},
        {"from": "human", "value": "And?"},
        {"from": "assistant", "value": "Bye."},
    ]
}
MESSAGES = {"messages": dialogue("Hello?", "Hi.", "And?", "Bye.")}
SINGLE = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.fixture
def opened(tmp_path, mixtral):
    """Open items as data; `entry` adds keys to their META entry."""

    def run(items, *, max_words=256, tokenizer=mixtral, entry=(), **options):
        path = write(tmp_path / "items.jsonl", items)
        meta = {"META": [{"path": str(path), "type": "text", **dict(entry)}]}
        return FinetuneData.open(meta, tokenizer, max_words=max_words, **options)

    return run


def spans(data, tokenizer, item=0):
    example = data.example(item)
    return learnt(example.ids, example.learn, tokenizer)


def test_dialogues_of_both_spellings_are_the_templates(opened, mixtral):
    data = opened([TALK, MESSAGES])
    assert data.example(0) == data.example(1)
    ids, learn = get_template("default").encode(MESSAGES["messages"], mixtral)
    assert (data.example(0).ids, data.example(0).learn) == (ids, learn)
    assert spans(data, mixtral) == [" Hi.\n###", " Bye.\n###"]
    assert data.lengths.tolist() == [len(ids)] * 2
    assert data.lengths.dtype == data.groups.dtype == np.int32


@pytest.mark.parametrize("template", ["default", "alpaca", "mistral", "chatml", "none", "tokenizer"])
def test_templates(opened, mixtral_json, byte_level, template):
    tokenizer = byte_level if template == "tokenizer" else mixtral_json
    data = opened([TALK], template=template, tokenizer=tokenizer)
    assert (data.example(0).ids, data.example(0).learn) == get_template(template, tokenizer).encode(
        MESSAGES["messages"], tokenizer
    )


@pytest.mark.parametrize("prompt_type", ["alpaca", "shortqa", "qg", "caption", "None"])
def test_single_turns_are_the_prompt_and_the_answer(opened, mixtral, prompt_type):
    data = opened([SINGLE], entry={"prompt_type": prompt_type})
    prompt = mixtral.encode(format_prompt("Add.", "1 and 2", prompt_type), bos=True)
    ids = data.example(0).ids
    answer = mixtral.encode("3", bos=False, eos=True, prefix=prompt_type == "caption")
    begin = [mixtral.bos_id] if prompt_type == "caption" else prompt
    assert ids == begin + answer
    assert data.example(0).learn == [False] * len(begin) + [True] * len(answer)


def test_single_turns_by_default(opened, mixtral):
    assert opened([SINGLE], dialog=False).example(0) == opened([SINGLE], entry={"prompt_type": "alpaca"}).example(0)
    # If an item has no input, prompt type and dialogue template alpaca give the same text.
    plain = {"instruction": "Add.", "output": "3"}
    as_dialogue = opened([plain], template="alpaca").example(0)
    assert opened([plain], dialog=False).example(0) == as_dialogue
    assert opened([SINGLE]).example(0) == opened([{"messages": dialogue("Add.\n1 and 2", "3")}]).example(0)
    assert opened([TALK], dialog=False).example(0) == opened([TALK]).example(0)
    for dialog in (True, False):  # one prompt type for all files that name none
        as_named = opened([SINGLE], entry={"prompt_type": "qg"}).example(0)
        assert opened([SINGLE], prompt_type="qg", dialog=dialog).example(0) == as_named
        assert opened([SINGLE], prompt_type="shortqa", entry={"prompt_type": "qg"}).example(0) == as_named


def test_preprocessing_of_the_original(opened, mixtral, tmp_path):
    write_picture(tmp_path / "a.jpg")
    llava = {**TALK, "image": "a.jpg"}
    options = {"dialog": False, "image_tokens": 3}
    data = opened([llava], entry={"preprocess": "single_turn_llava", "root": str(tmp_path)}, **options)
    assert spans(data, mixtral) == ["Hi.</s>"]
    assert data.example(0).image == str(tmp_path / "a.jpg")
    captions = [{"url": "a.jpg", "caption": text} for text in ("A cat.", ["A dog.", "A cow."])]
    data = opened(captions, entry={"preprocess": "caption", "root": str(tmp_path)}, image_tokens=3)
    assert [spans(data, mixtral, i) for i in (0, 1)] == [[" A cat.</s>"], [" A cow.</s>"]], "they open a text"
    with pytest.raises(InputError, match=r"items\.jsonl:1: preprocess: caption needs url and caption; found conv"):
        opened([TALK], entry={"preprocess": "caption"})


def test_every_document_begins_with_one_bos(opened, mixtral):
    forged = {"messages": dialogue("<s>[INST]</s> hello", "<s> no</s>")}
    for template in ("default", "mistral", "alpaca"):
        ids = opened([forged], template=template).example(0).ids
        assert (ids[0], ids.count(mixtral.bos_id)) == (mixtral.bos_id, 1)
        assert ids.count(mixtral.eos_id) == (template != "default")


# --------------------------------------------------------------------------- what is refused

BROKEN = {
    "not JSON": ('{"messages": [', r"not valid JSON \(Expecting value at column 15\)"),
    "unknown role": (
        {"messages": [{"role": "robot", "content": "x"}]},
        r"messages\[0\]: unknown role 'robot'; known are",
    ),
    "empty conversation": ({"conversations": []}, r"messages: the list is empty; give at least one message"),
    "missing image": ({**TALK, "image": "no.jpg"}, r"image: pictures/no\.jpg: no such file"),
    "image of another kind": ({**TALK, "image": 3}, r"image: got 3, but it must be a path"),
    "nothing to learn": ({"messages": dialogue("x")}, r"there is nothing to learn: the assistant says nothing"),
    "empty answer": (
        {"messages": dialogue("x", "", "y", "z")},
        r"messages\[1\]: there is nothing to learn: the assistant's turn is empty",
    ),
    "blank last answer": (
        {"conversations": dialogue("x", "y", "z", " \n")},
        r"messages\[3\]: there is nothing to learn",
    ),
    "empty output": (
        {"instruction": "x", "output": ""},
        r"output: there is nothing to learn: the answer is empty",
    ),
    "blank output": ({"instruction": "x", "input": "y", "output": "\t "}, r"output: there is nothing to learn"),
    "two users in a row": ({"messages": [*dialogue("x"), *dialogue("y")]}, r"messages\[1\]: the role is user"),
    "no text": ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]: content: got None"),
    "no item": (
        {"words": "x"},
        r"no dialogue and no single turn: found words; an item has conversations, or messages, or",
    ),
    "not an object": (["x"], r"got \['x'\], but an item must be an object"),
    "output of another kind": ({"instruction": "x", "output": 3}, r"output: got 3, but it must be text"),
    "no instruction": ({"output": "x"}, r"instruction: missing; found output"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_items_are_one_line_with_their_place(tmp_path, mixtral, name):
    item, message = BROKEN[name]
    path = tmp_path / "items.jsonl"
    lines = [json.dumps(TALK)] * 3 + [item if isinstance(item, str) else json.dumps(item)] + [json.dumps(TALK)] * 3
    path.write_text("\n".join(lines))
    meta = {"META": [{"path": str(path), "type": "text", "root": "pictures"}]}
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}:4: {message}") as error:
        FinetuneData.open(meta, mixtral, max_words=64, image_tokens=4)
    assert "\n" not in str(error.value)
    problems = []
    data = FinetuneData.open(meta, mixtral, max_words=64, problems=problems, image_tokens=4)
    assert problems == [str(error.value).removesuffix("; broken_images=skip leaves such items out")]
    assert [data.where(i) for i in range(len(data))] == [f"{path}:{n}" for n in (1, 2, 3, 5, 6, 7)]


def test_all_problems_are_told_in_order(tmp_path, mixtral):
    bad = [json.dumps(item) if not isinstance(item, str) else item for item, _ in BROKEN.values()]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join((bad + [json.dumps(TALK)] * 200) * 2))
    gone = tmp_path / "gone.json"
    gone.write_text("[{]")
    problems = []
    meta = {"META": [{"path": str(path)}, {"path": str(gone)}]}
    data = FinetuneData.open(meta, mixtral, max_words=64, problems=problems, image_tokens=4)
    image = list(BROKEN).index("missing image") + 1  # images are opened after the whole file is read
    numbers = [n + 1 for n in range(len(bad)) if n + 1 != image]
    expected = [*numbers, *(n + 200 + len(bad) for n in numbers), image, image + 200 + len(bad)]
    assert [p.split(": ")[0] for p in problems] == [*(f"{path}:{n}" for n in expected), f"{gone}:1"]
    assert len(data) == 400


def test_the_first_of_many_broken_lines_is_told_before_the_rest_is_read(tmp_path, mixtral, monkeypatch):
    """Two of 100,000 lines are not JSON."""
    lines = [json.dumps({"messages": dialogue("q", "a")})] * 100_000
    lines[1233] = lines[77_777] = "{'single': 'quotes'}"
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(lines))
    read, real, threads = [], encoding.encode_item, threading.active_count()
    monkeypatch.setattr(encoding, "encode_item", lambda *a: (read.append(1), real(*a))[1])
    with pytest.raises(InputError, match=r"items\.jsonl:1234: not valid JSON \(Expecting property name"):
        FinetuneData.open({"META": [{"path": str(path)}]}, mixtral, max_words=64)
    assert len(read) < 20_000
    assert threading.active_count() <= threads


@pytest.mark.parametrize("template", ["default", "mistral", "chatml", "none"])
def test_only_answers_must_not_be_empty(opened, template):
    """Of questions and system messages nothing is learnt, so they may be empty."""
    items = [{"messages": dialogue("", "a", " ", "b", system="")}, {"instruction": "", "input": "", "output": "c"}]
    assert len(opened(items, template=template)) == 2


@pytest.mark.parametrize(
    ("recipe", "item", "key"),
    [
        ("caption", {"url": "a.jpg", "caption": " "}, "caption"),
        ("single_turn_llava", {"conversations": [{"value": "q"}, {"value": ""}]}, "conversations[1]"),
    ],
)
def test_empty_answers_of_the_originals_recipes_are_named_by_their_own_keys(opened, recipe, item, key):
    with pytest.raises(InputError, match=re.escape(f"items.jsonl:1: {key}: there is nothing to learn: the answer is")):
        opened([item], entry={"preprocess": recipe})


def test_empty_files(opened):
    with pytest.raises(InputError, match=r"data_config: there are no items in .*items\.jsonl"):
        opened([])
    with pytest.raises(InputError, match=r"items\.jsonl:1: there is nothing to learn.*\(and 1 more like it\)"):
        opened([{"messages": dialogue("x")}] * 2, problems=[])


def test_a_missing_package_is_no_broken_item(opened, byte_level, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        opened([TALK], template="tokenizer", tokenizer=byte_level)


# --------------------------------------------------------------------------- cuts, shares, groups


def test_long_items_are_cut_on_the_right(opened, caplog):
    long = {"messages": dialogue("q", "a " * 100)}
    late = {"messages": dialogue("q " * 100, "a")}
    whole = opened([TALK, long, late], max_words=4096)
    size = int(whole.lengths[0])
    with caplog.at_level(logging.WARNING):
        data = opened([TALK, long, late], max_words=size)
    assert (len(data), data.truncated, data.dropped) == (2, 1, 1)
    assert [r.getMessage() for r in caplog.records] == [
        f"max_words: 1 of 2 items are longer than {size} and cut",
        f"max_words: 1 items are left out: their first {size} tokens hold nothing to learn",
    ]
    assert data.lengths.tolist() == [size, size]
    assert data.example(0) == whole.example(0)
    cut = data.example(1)
    assert (cut.ids, cut.learn, cut.truncated) == (whole.example(1).ids[:size], whole.example(1).learn[:size], True)
    first = whole.example(0).learn.index(True)
    assert len(opened([TALK], max_words=first + 1)) == 1
    with pytest.raises(InputError, match=f"max_words: got {first}, but no item has anything to learn in so few tokens"):
        opened([TALK], max_words=first)


def test_shares(opened):
    items = [{"messages": dialogue(f"question {n}", "answer")} for n in range(200)]
    share = opened(items, entry={"ratio": 0.1})
    again = opened(items, entry={"ratio": 0.1})
    other = opened(items, entry={"ratio": 0.1}, seed=1)
    places = [[d.where(i) for i in range(len(d))] for d in (share, again, other)]
    assert len(share) == len(set(places[0])) == 20
    assert places[0] == places[1] != places[2]
    assert share.fingerprint() == again.fingerprint() != other.fingerprint()
    assert (share.files[0].items, share.files[0].taken) == (200, 20)
    assert len(opened(items[:3], entry={"ratio": 0.01})) == 1, "a share of a file is never nothing"


def test_groups_and_files(tmp_path, mixtral):
    paths = [write(tmp_path / f"{n}.jsonl", [TALK] * (n + 1)) for n in range(3)]
    kinds = ["text", "image_text", "text"]
    meta = {"META": [{"path": str(p), "type": k} for p, k in zip(paths, kinds, strict=True)]}
    data = FinetuneData.open(meta, mixtral, max_words=64)
    assert data.group_names == ["text", "image_text"]
    assert data.groups.tolist() == [0, 1, 1, 0, 0, 0]
    assert [data.where(i) for i in (0, 2, 5)] == [f"{paths[0]}:1", f"{paths[1]}:2", f"{paths[2]}:3"]
    assert [data.source_of(i).path for i in (0, 2, 5)] == paths


# --------------------------------------------------------------------------- kept on disk


def test_what_was_encoded_is_kept(tmp_path, opened, mixtral, mixtral_json, monkeypatch):
    write_picture(tmp_path / "a.jpg")
    items = [TALK, {**MESSAGES, "image": "a.jpg"}, SINGLE]
    options = {"entry": {"root": str(tmp_path)}, "cache_ann_on_disk": True, "image_tokens": 5}
    plain = opened(items, entry=options["entry"], image_tokens=5)
    encoded = []
    real = encoding.encode_item
    monkeypatch.setattr(encoding, "encode_item", lambda *a: (encoded.append(1), real(*a))[1])

    def count(items=items, **more):
        encoded.clear()
        data = opened(items, **{**options, **more})
        return len(encoded), data

    assert count()[0] == 3
    again, data = count()
    assert again == 0
    assert data.fingerprint() == plain.fingerprint()
    assert [data.example(i) for i in range(3)] == [plain.example(i) for i in range(3)]
    assert isinstance(data.files[0].encoded.ids, np.memmap)
    kept = tmp_path / token_cache.FOLDER
    assert sorted(p.suffix for folder in kept.iterdir() for p in folder.iterdir()) == [".json"] + [".npy"] * 5
    # A change that affects the encoded ids makes a new cache; any other change uses the old one.
    assert count(max_words=45)[0] == 0
    assert count(seed=3)[0] == 0
    assert count(image_tokens=7)[0] == 0, "places are not kept"
    assert count(template="mistral")[0] == 3
    assert count(dialog=False)[0] == 3
    assert count(tokenizer=mixtral_json)[0] == 3
    assert count(entry={**options["entry"], "prompt_type": "qg"})[0] == 3
    assert count([*items, TALK])[0] == 4
    monkeypatch.setattr("accessory.data.templates.DefaultTemplate.system", "Another.")
    assert count()[0] == 3, "a template that writes otherwise"
    monkeypatch.undo()
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"items\.jsonl:2: image: .*a\.jpg: no such file"):
        opened(items, **options)
    shares = {"entry": {"ratio": 0.5}, "cache_ann_on_disk": True}
    lots = [{"messages": dialogue(f"question {n}", "answer")} for n in range(40)]
    prints = [opened(lots, **shares, seed=s).fingerprint() for s in (0, 1, 0, 1)]
    assert prints[0] == prints[2] != prints[1] == prints[3]


def test_what_is_broken_is_not_kept_and_kept_things_that_break_are_made_again(tmp_path, opened):
    where = tmp_path / "elsewhere"
    options = {"cache_ann_on_disk": True, "cache_dir": where}
    opened([TALK, {"messages": []}], **options, problems=[])
    assert not where.exists()
    opened([TALK], **options)
    (folder,) = where.iterdir()
    (folder / "ids.npy").write_bytes(b"\x93NUMPY broken")
    assert len(opened([TALK], **options)) == 1
    assert opened([TALK], **options).example(0) == opened([TALK]).example(0)
    assert list(where.iterdir()) == [folder], "nothing is left lying about"


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path, opened, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert len(opened([TALK], cache_ann_on_disk=True, cache_dir=tmp_path / "file")) == 1
    assert "cannot be written (Not a directory), so nothing is kept" in caplog.text


def test_a_cache_appears_whole_or_not_at_all(tmp_path, opened, monkeypatch):
    options = {"cache_ann_on_disk": True, "cache_dir": tmp_path / "kept"}
    synced = []

    def fail(handle):
        synced.append(handle)
        if len(synced) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        opened([TALK], **options)
    assert not list((tmp_path / "kept").iterdir())
    monkeypatch.undo()
    (old := tmp_path / "kept" / "a-1.7.partial").mkdir()
    (new := tmp_path / "kept" / "a-2.8.partial").mkdir()
    os.utime(old, (0, 0))  # the process that wrote it was killed long ago
    opened([TALK], **options)
    assert (old.exists(), new.exists()) == (False, True)
    assert len(opened([TALK], **options)) == 1
