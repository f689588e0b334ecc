"""Which files are one model: a hand-written table; and a folder and a listing of its names always agree."""

import json
import logging
import random
import re
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import checkpoints as make
from helpers.checkpoints import random_tensors
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from accessory.checkpoint.model_files import FORMS, RESOURCES, files_to_load, holds_weights, model_files
from accessory.checkpoint.weight_files import find_weights
from accessory.errors import CheckpointError

SHARDED_2 = ["consolidated.00-of-02.model.pth", "consolidated.01-of-02.model.pth"]
SHARDED_1 = ["consolidated.00-of-01.model.pth"]
SAFE_SHARDS = ["consolidated.00-of-02.model.safetensors", "consolidated.01-of-02.model.safetensors"]
HF_2 = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
HF_3 = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
HF, HF_INDEX = "model.safetensors", "model.safetensors.index.json"
MISTRAL_2 = ["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"]
MISTRAL, MISTRAL_INDEX = "consolidated.safetensors", "consolidated.safetensors.index.json"
PTH = ["consolidated.00.pth", "consolidated.01.pth"]
PT = ["consolidated.00.pt", "consolidated.01.pt"]
BINS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PIECES = [f"consolidated.00.pth-split{i}" for i in range(11)]


def index_of(files):
    return {"weight_map": {f"tensor{i}": name for i, name in enumerate(files)}}


def listed(names, indexes=None, wanted=None):
    """The files that a listing of these names selects, without resources."""
    found = files_to_load(names, lambda name: (indexes or {})[name], "here", wanted=wanted)
    return [name for name in found if name not in RESOURCES and not name.endswith(".index.json")]


def in_folder(folder, names, indexes=None):
    """The survey of a folder of empty files with these names."""
    for name in names:
        (folder / name).write_text(json.dumps(indexes[name]) if name in (indexes or {}) else "")
    return find_weights(folder)


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (["consolidated.00.pth", "params.json", "x.txt"], ["consolidated.00.pth", "params.json"]),
        (
            ["consolidated.00.pth-split1", "consolidated.00.pth-split0"],
            ["consolidated.00.pth-split0", "consolidated.00.pth-split1"],
        ),
        (["consolidated.safetensors", "consolidated.00.pt"], ["consolidated.safetensors"]),
        (["pytorch_model.bin", "a.gguf"], ["pytorch_model.bin"]),
        (
            ["consolidated.00-of-01.model.pth", "consolidated.00-of-01.model.safetensors", "model.safetensors"],
            ["consolidated.00-of-01.model.safetensors"],
        ),
        (["consolidated.00-of-02.model.pth", "consolidated.00-of-01.model.pth"], ["consolidated.00-of-01.model.pth"]),
        (
            ["consolidated.00-of-01.model.pth", "consolidated.00-of-01.optimizer.pth"],
            ["consolidated.00-of-01.model.pth"],
        ),
    ],
)
def test_which_files_one_layout_needs(present, expected):
    assert files_to_load(present, lambda name: {}, "here") == expected


@pytest.mark.parametrize(
    "present",
    [
        ["consolidated.01-of-02.model.pth"],
        ["model-00002-of-00002.safetensors"],
        ["consolidated.00.pth-split0", "consolidated.00.pth-split2"],
        ["consolidated.01.pt"],
    ],
)
def test_missing_shards_are_named(present):
    with pytest.raises(CheckpointError, match=r"numbers \[\d\] are missing"):
        files_to_load(present, lambda name: {}, "here")


@pytest.mark.parametrize(
    ("names", "indexed", "expected"),
    [
        # Each form alone, in each of its spellings.
        (SAFE_SHARDS, {}, SAFE_SHARDS),
        (SHARDED_2, {}, SHARDED_2),
        (HF_2, {}, HF_2),
        ([HF], {}, [HF]),
        ([*HF_2, HF_INDEX], {HF_INDEX: HF_2}, HF_2),
        (["a.safetensors", "b.safetensors", HF_INDEX], {HF_INDEX: ["a.safetensors"]}, ["a.safetensors"]),
        (MISTRAL_2, {}, MISTRAL_2),
        ([MISTRAL], {}, [MISTRAL]),
        ([*MISTRAL_2, MISTRAL_INDEX], {MISTRAL_INDEX: MISTRAL_2}, MISTRAL_2),
        (PTH, {}, PTH),
        (PT, {}, PT),
        (BINS, {}, BINS),
        ([BIN], {}, [BIN]),
        ([*BINS, BIN_INDEX], {BIN_INDEX: BINS}, BINS),
        (PIECES, {}, PIECES),
        (["consolidated.00.pth-split00", "consolidated.00.pth-split01"], {}, None),
        (["consolidated.00.pth-split0", "consolidated.01.pth-split0", "consolidated.01.pth-split1"], {}, None),
        # If a folder has several forms, the first in order is read; each is tested against the next.
        ([*SAFE_SHARDS, *SHARDED_2], {}, SAFE_SHARDS),
        ([*SHARDED_1, HF], {}, SHARDED_1),
        ([*HF_2, MISTRAL], {}, HF_2),
        ([MISTRAL, *PTH], {}, [MISTRAL]),
        ([*PTH, *PT], {}, PTH),
        ([*PT, BIN], {}, PT),
        ([BIN, *PIECES], {}, [BIN]),
        ([*PIECES, "a.gguf"], {}, PIECES),
        ([HF, BIN], {}, [HF]),
        # An index says which files belong together: shards were written next to an old single file.
        ([HF, *HF_2, HF_INDEX], {HF_INDEX: HF_2}, HF_2),
        ([*HF_2, *HF_3, HF_INDEX], {HF_INDEX: HF_3}, HF_3),
        ([MISTRAL, *MISTRAL_2, MISTRAL_INDEX], {MISTRAL_INDEX: MISTRAL_2}, MISTRAL_2),
        # A whole set wins over an incomplete one: a single file was written next to an old index,
        ([HF, HF_INDEX], {HF_INDEX: HF_2}, [HF]),
        # an index was fetched without its files,
        ([HF_INDEX, MISTRAL], {HF_INDEX: HF_2}, [MISTRAL]),
        ([HF_INDEX, *BINS, BIN_INDEX], {HF_INDEX: HF_2, BIN_INDEX: BINS}, BINS),
        # or one download stopped early.
        ([HF_2[0], HF], {}, [HF]),
        ([HF_2[1], *BINS], {}, BINS),
        ([SAFE_SHARDS[0], *SHARDED_2], {}, SHARDED_2),
        ([SHARDED_2[0], *SHARDED_1], {}, SHARDED_1),
        ([*SHARDED_2[1:], *PTH], {}, PTH),
        ([PTH[1], *PT], {}, PT),
        # Files that only look like weights of a model are ignored.
        ([*SHARDED_1, "consolidated.00-of-01.optimizer.pth", "notes.txt"], {}, SHARDED_1),
        ([HF, "model.fp32-00001-of-00001.safetensors", "adapter_model.safetensors"], {}, [HF]),
        ([*HF_2, "model-00003-of-00002.safetensors", "model-00001-of-00000.safetensors"], {}, HF_2),
        ([*PTH, "config.json", "params.json", "tokenizer.model"], {}, PTH),
    ],
)
def test_which_files_are_the_model(tmp_path, names, indexed, expected):
    expected = names if expected is None else expected
    indexes = {index: index_of(files) for index, files in indexed.items()}
    assert listed(names, indexes) == expected
    weights = in_folder(tmp_path, names, indexes)
    assert weights.problems == []
    assert weights.present == [tmp_path / name for name in expected]
    assert weights.sharded == (".model." in expected[0])


@pytest.mark.parametrize(
    ("names", "indexed", "missing", "in_listing"),
    [
        (SHARDED_2[1:], {}, SHARDED_2[:1], r"of consolidated\.01-of-02\.model\.pth and its like, numbers \[0\]"),
        (HF_3[1:2], {}, [HF_3[0], HF_3[2]], r"of model-00002-of-00003\.safetensors and its like, numbers \[1, 3\]"),
        (MISTRAL_2[:1], {}, MISTRAL_2[1:], r"numbers \[2\] are missing"),
        (PTH[1:], {}, PTH[:1], r"numbers \[0\] are missing"),
        (PT[1:], {}, PT[:1], r"numbers \[0\] are missing"),
        (BINS[1:], {}, BINS[:1], r"numbers \[1\] are missing"),
        ([PIECES[i] for i in (0, 2, 4)], {}, [PIECES[1], PIECES[3]], r"of .*-split0 and its like, numbers \[1, 3\]"),
        (
            [*HF_3[:2], HF_INDEX],
            {HF_INDEX: HF_3},
            HF_3[2:],
            rf"names files .* not in its folder: {HF_3[2]}",
        ),
        ([HF_INDEX], {HF_INDEX: ["../../a.safetensors"]}, ["../../a.safetensors"], r"not in its folder: \.\./\.\./a"),
        # If the index names more files than a set has, the set is incomplete, even if its names say it is whole.
        ([*HF_2, HF_INDEX], {HF_INDEX: [*HF_2, "head.safetensors"]}, ["head.safetensors"], "names files"),
        # If every set is incomplete, the first form and the largest count are reported.
        ([*HF_2[:1], *PTH[1:]], {}, HF_2[1:], r"numbers \[2\]"),
        ([HF_2[0], *HF_3[:2]], {}, HF_3[2:], r"numbers \[3\]"),
        # A GGUF file does not replace the missing files.
        ([*HF_2[:1], "a.gguf"], {}, HF_2[1:], r"numbers \[2\]"),
    ],
)
def test_what_is_missing_is_named(tmp_path, names, indexed, missing, in_listing):
    indexes = {index: index_of(files) for index, files in indexed.items()}
    with pytest.raises(CheckpointError, match=in_listing):
        listed(names, indexes)
    weights = in_folder(tmp_path, names, indexes)
    assert [problem for problem in weights.problems if problem.startswith(f"missing file {', '.join(missing)} (")]


@pytest.mark.parametrize(
    ("names", "doubt"),
    [
        (
            [HF, *HF_2],
            r"model\.safetensors and shards of 2 lie in one folder, .*00001-of.*; keep one of them, or the",
        ),
        ([HF, *HF_2, HF_3[0]], r"model\.safetensors and shards of 2 lie in one folder"),
        ([*HF_2, *HF_3], r"shards of 2 and of 3 lie in one folder"),
        ([BIN, *BINS], r"pytorch_model\.bin and shards of 2 lie in one folder"),
        ([*SHARDED_1, *SHARDED_2], r"shards of 1 and of 2 lie in one folder, .*; keep one of them$"),
        (["consolidated.0.pth", "consolidated.00.pth"], r"consolidated\.0\.pth and .*00\.pth have the same number"),
        ([*PIECES[:2], "consolidated.00.pth-split01"], r"split01 and .*split1 have the same number"),
    ],
)
def test_two_whole_models_and_nothing_to_say_which_are_refused(tmp_path, names, doubt):
    with pytest.raises(CheckpointError, match=doubt):
        listed(names)
    (problem,) = in_folder(tmp_path, names).problems
    assert re.search(doubt, problem)


def test_a_stale_single_file_beside_shards_is_never_read_in_their_place(tmp_path):
    """Hugging Face's `save_pretrained` may leave an old model.safetensors next to new shards and their index."""
    make.write_hf(tmp_path, random_tensors(seed=1), files=3)
    save_file({"stale": torch.zeros(1)}, tmp_path / HF)
    assert not any("stale" in (tensors or {}) for tensors in find_weights(tmp_path).read().values())
    (tmp_path / HF_INDEX).unlink()
    assert find_weights(tmp_path).problems != []


@pytest.mark.parametrize(
    ("names", "passed_over"),
    [
        ([HF, HF_INDEX], rf"{HF_INDEX} names files .*: {HF_2[0]}, {HF_2[1]}; read instead: model\.safetensors"),
        ([HF_2[0], *BINS], rf"of {HF_2[0]} and its like, numbers \[2\] are missing; read instead: {', '.join(BINS)}"),
        ([HF, *PTH], None),
    ],
)
def test_a_warning_says_which_copy_was_passed_over(tmp_path, caplog, names, passed_over):
    caplog.set_level(logging.WARNING)
    indexes = {HF_INDEX: index_of(HF_2)}
    listed(names, indexes)
    in_folder(tmp_path, names, indexes).read()
    assert len(caplog.messages) == (2 if passed_over else 0)
    assert all(re.search(passed_over, message) for message in caplog.messages)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": [HF]}, {"weight_map": {"a": 1}}, [], None])
def test_an_index_that_is_none_is_never_passed_over(tmp_path, content):
    (tmp_path / HF_INDEX).write_text("{" if content is None else json.dumps(content))
    (tmp_path / HF).touch()
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: not an index"):
        find_weights(tmp_path)
    if isinstance(content, dict):
        with pytest.raises(CheckpointError, match=r"^here: model\.safetensors\.index\.json: not an index"):
            listed([HF, HF_INDEX], {HF_INDEX: content})


def test_index_configuration_and_tokenizer_come_along():
    names = ["tokenizer.model", "README.md", HF_INDEX, *HF_2, HF, "config.json", "pytorch_model.bin.index.json"]
    chosen = files_to_load(names, {HF_INDEX: index_of(HF_2)}.__getitem__, "here")
    assert chosen == [*HF_2, HF_INDEX, "config.json", "tokenizer.model"]


def test_gguf_files_are_taken_from_a_listing_and_opened_by_their_own_names(tmp_path):
    assert listed(["a.gguf", "config.json"]) == ["a.gguf"]
    with pytest.raises(CheckpointError, match=r"here: several \.gguf files, name one of them: a\.gguf, b\.gguf"):
        listed(["b.gguf", "a.gguf"])
    with pytest.raises(CheckpointError, match=r"no checkpoint in this folder; it holds a\.gguf"):
        in_folder(tmp_path, ["a.gguf"])


def test_a_huge_count_is_no_count():
    assert model_files(["model-1-of-999999.safetensors"], lambda name: {}, "here") is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([*HF_3, HF_INDEX], HF_3[1:2]),
        ([HF, *HF_3, HF_INDEX], HF_3[1:2]),
        (["open_clip_model.safetensors", "open_clip_pytorch_model.bin"], ["open_clip_model.safetensors"]),
        (["open_clip_pytorch_model.bin", "a.gguf", "b.gguf"], ["open_clip_pytorch_model.bin"]),
        (["model.pt"], ["model.pt"]),
        ([BIN, "other.safetensors"], [BIN]),
    ],
)
def test_for_a_part_of_a_model_only_its_files(names, expected):
    assert listed(names, {HF_INDEX: index_of(HF_3)}, wanted=lambda tensor: tensor == "tensor1") == expected


@pytest.mark.parametrize(
    "names", [["a.safetensors", "b.safetensors"], ["a.gguf"], ["a.bin", "b.pt"], [*HF_3, HF_INDEX], ["README.md"]]
)
def test_no_files_for_a_part_of_a_model_that_are_not_its_own(names):
    with pytest.raises(CheckpointError, match="here: no checkpoint among the files of this folder; it has "):
        listed(names, {HF_INDEX: index_of(HF_3)}, wanted=lambda tensor: False)


def test_a_part_is_not_taken_for_a_file_of_any_name():
    with pytest.raises(CheckpointError, match=r"numbers \[2\] are missing"):
        listed(HF_2[:1], wanted=lambda tensor: True)


def test_names_that_hold_weights():
    known = [*SAFE_SHARDS, *SHARDED_2, *HF_2, HF, *MISTRAL_2, MISTRAL, *PTH, *PT, *BINS, BIN, *PIECES, "a.gguf"]
    assert all(map(holds_weights, known))
    assert not any(map(holds_weights, ["", "README.md", HF_INDEX, "x.safetensors", "consolidated.00-of-01.other.pth"]))


def spelled(form, number, count):
    """Two names of one file of a set: number and count with one digit and with two."""
    return {
        form.numbered.format(number=f"{number:0{width}d}", count=f"{count:0{width}d}", whole="00") for width in (1, 2)
    }


# Every name of the table with small numbers, so that some sets are whole; and other names.
INDEXES = (HF_INDEX, MISTRAL_INDEX, BIN_INDEX)
NUMBERED = [form for form in FORMS if form.numbered]
NAMES = sorted(
    {name for form in NUMBERED for count in range(4) for number in range(4) for name in spelled(form, number, count)}
    | {form.single for form in FORMS if form.single}
    | {"a.gguf", "b.gguf", "a.safetensors", "a.bin", "consolidated.01.pth-split0", "README.md", "config.json", *INDEXES}
)
SETS = [
    [max(spelled(form, number, count)) for number in range(form.first, form.first + count)]
    for form in NUMBERED
    for count in (1, 2, 3)
]


@st.composite
def folders(draw):
    """File names, and the contents of the index files among them."""
    names = set(draw(st.lists(st.sampled_from(NAMES), max_size=5)))
    names |= set(draw(st.just([]) | st.sampled_from(SETS))) | set(draw(st.just([]) | st.sampled_from(SETS)))
    names |= {draw(st.sampled_from(INDEXES))} if draw(st.booleans()) else set()
    weights = {name for name in names if holds_weights(name) and not name.endswith(".gguf")}
    pool = st.sampled_from(sorted(weights | {"absent.safetensors", "../out.safetensors"}))
    maps = st.dictionaries(st.sampled_from("abcd"), pool, max_size=4)
    indexes = {name: {"weight_map": draw(maps)} for name in INDEXES if name in names}
    return sorted(names), indexes


def outcome_of_a_listing(names, indexes):
    """What a listing says: the files, the missing numbers or names, or another message."""
    try:
        return "files", set(listed(names, indexes))
    except CheckpointError as error:
        said = str(error).removeprefix("here: ")
    if numbers := re.search(r"numbers \[(.*)\] are missing", said):
        return "numbers", {int(number) for number in numbers[1].split(", ")}
    if missing := re.search(r"names files that are not in its folder: (.*)", said):
        return "missing", set(missing[1].split(", "))
    return "refused", "none" if said.startswith("no checkpoint") or ".gguf files" in said else said


def outcome_in_a_folder(names, indexes):
    """What the survey of a folder says, in the same form."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            weights = in_folder(Path(folder), names, indexes)
        except CheckpointError as error:
            said = str(error).removeprefix(f"{folder}: ")
            return "refused", "none" if said.startswith("no checkpoint") else said
        if not weights.problems:
            return "files", {path.name for path in weights.present}
    lists = [found[1].split(", ") for p in weights.problems if (found := re.match(r"missing file (.*) \(", p))]
    missing = {name for names in lists for name in names}
    return ("missing", missing) if missing else ("refused", weights.problems[0])


@settings(max_examples=100, deadline=None)
@given(folders())
def test_a_folder_and_a_listing_of_its_names_give_the_same_answer(folder):
    names, indexes = folder
    kind, found = outcome_of_a_listing(names, indexes)
    event(kind if kind != "refused" else found.split(":")[0][:30])
    there, surveyed = outcome_in_a_folder(names, indexes)
    if kind == "files" and next(iter(found)).endswith(".gguf"):  # opened by the name of the file, not of the folder
        assert (there, surveyed) == ("refused", "none")
    elif kind == "numbers":
        assert there == "missing"
        assert found == {int(re.search(r"(\d+)(-of-\d+[.\w]*|\.pth|\.pt)?$", name)[1]) for name in surveyed}
    else:
        assert (there, surveyed) == (kind, found)


@settings(max_examples=100, deadline=None)
@given(folders(), st.randoms(use_true_random=False))
def test_neither_order_nor_what_was_left_behind_changes_the_answer(folder, order: random.Random):
    names, indexes = folder
    outcome = outcome_of_a_listing(names, indexes)
    shuffled = [*names, "zzz.txt", "LICENSE"]
    order.shuffle(shuffled)
    assert outcome_of_a_listing(shuffled, indexes) == outcome
    if outcome[0] == "files":
        # After a download, the folder has the chosen files and every index that was read.
        fetched = outcome[1] | set(indexes)
        assert outcome_of_a_listing(fetched, indexes) == outcome
