"""META lists and the files they name: every item with its line number, every error with its place."""

import csv
import json
import re
import time

import pytest
from helpers.examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.data import records as module
from accessory.data.records import Source, is_data_file, open_records, read_meta
from accessory.errors import ConfigError, InputError, MissingExtraError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab{}[]",\\\n\u00e9\u2028', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='k"{}[]\\', max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
items_of = st.lists(st.dictionaries(st.text(alphabet="abc", max_size=3), values, max_size=4), max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


def everything(path):
    records = open_records(path)
    return [records.read(i) for i in range(len(records))]


@given(items_of, st.sampled_from([None, 0, 2]), st.booleans())
@settings(max_examples=examples(150), deadline=None)
def test_json_lists_are_cut_where_json_does(folder, items, indent, ascii_):
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_)
    path = folder / "list.json"
    path.write_text(text, encoding="utf-8")
    records = open_records(path)
    assert [records.read(i) for i in range(len(records))] == items
    if indent is not None:  # then each item begins on a new line
        begins = [n for n, line in enumerate(text.split("\n"), start=1) if line[indent : indent + 1] == "{"]
        begins = [n for n in begins if text.split("\n")[n - 1][:indent].strip() == ""]
        assert set(records.lines.tolist()) <= set(begins)


@given(items_of, st.lists(st.sampled_from(["", "\n", "  \n", "\r\n"]), min_size=7, max_size=7), st.booleans())
@settings(max_examples=examples(100), deadline=None)
def test_json_lines_may_have_blank_ones_between_them(folder, items, blanks, ends):
    text, lines = "", []
    for item, blank in zip(items, blanks, strict=False):
        text += blank
        lines.append(text.count("\n") + 1)
        text += json.dumps(item, ensure_ascii=False).replace("\u2028", "\\u2028") + "\n"
    path = folder / "lines.jsonl"
    path.write_bytes((text if ends else text.removesuffix("\n")).encode())
    records = open_records(path)
    assert [records.read(i) for i in range(len(records))] == items
    assert records.lines.tolist() == lines


def test_json_lines_in_a_json_file_are_read_as_what_they_are(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert everything(path) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    assert everything(path) == [{"a": 1}], "a byte order mark is no mistake"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"a": 1},\n{"a": 2,}\n]', r":3: not valid JSON \(.*property name.* at column"),
        ('[\n{"a": "x},\n{"a": 2}\n]', r":2: not valid JSON \(Invalid control character at column"),
        ('[\n{"a": 1}\n{"a": 2}\n]', r":3: not valid JSON \(Expecting ',' delimiter at column 1\)"),
        ('[{"a": 1},\n]', r":\d: not valid JSON"),
        ('[{"a": 1}] x', r":1: not valid JSON \(Extra data at column 12\)"),
        ('[{"a": 1}', r":1: not valid JSON \(Expecting ',' delimiter"),
        ("[1, 2]", r": \[0\]: got 1, but an item must be an object"),
        ('[{"a": 1}, ["b"]]', r": \[1\]: got \['b'\], but an item must be an object"),
        ('{"data": []}', r": expected a list of items, found dict"),
        ("", r":1: not valid JSON \(Expecting value at column 1\)"),
        ("[" * 100_000, r":1: not valid JSON \(nested too deep\)"),
    ],
)
def test_broken_lists_are_told_by_their_line(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}{message}") as error:
        everything(path)
    assert "\n" not in str(error.value)


def test_an_item_of_a_list_can_be_broken_alone(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"a": 1},\n{"a":\n tru},\n{"a": 3}\n]')
    records = open_records(path)
    assert (records.read(0), records.read(2)) == ({"a": 1}, {"a": 3})
    with pytest.raises(InputError, match=r"a\.json:4: not valid JSON \(Expecting value at column 2\)"):
        records.read(1)


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["instruction", "output", "id"])
        rows.writerow(["two\nlines", "a,b", "1"])
        rows.writerow(["second", "", "2"])
        rows.writerow(["short"])
    records = open_records(path)
    assert records.read(0) == {"instruction": "two\nlines", "output": "a,b"}, "columns that nobody knows are left out"
    assert records.read(1) == {"instruction": "second", "output": ""}
    assert records.lines.tolist() == [2, 4, 5]
    with pytest.raises(InputError, match=r"a\.csv:5: has 1 fields, but the first row names 3 columns"):
        records.read(2)
    path.write_text("instruction\toutput\nWhat, really?\tyes\n")
    assert everything(path) == [{"instruction": "What, really?", "output": "yes"}], "the original's use tabs"
    path.write_bytes(b"instruction,output\nfine,fine\n\xff,x\n")
    with pytest.raises(InputError, match=r"a\.csv:\d: not valid CSV"):
        everything(path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `data` reads parquet")
    parquet = pytest.importorskip("pyarrow.parquet")

    items = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "prompt_id": "x"},
        {"messages": None, "prompt_id": "y"},
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(items), path)
    assert everything(path) == [{"messages": items[0]["messages"]}, {}]
    assert open_records(path).place(2) == f"{path}:row 2"
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match=r"a\.parquet: not a parquet file"):
        open_records(path)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_without_answers_names_its_columns_and_the_known_ones(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    if ending == "csv":
        path.write_text("a,b\n1,2\n")
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="the extra `data` reads parquet")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist([{"a": 1, "b": 2}]), path)
    with pytest.raises(
        InputError, match=rf"a\.{ending}: found the columns a, b, but items need conversations, or messages"
    ):
        open_records(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mixtral-accessory\[data\]'"):
        open_records(tmp_path / "a.parquet")


def test_a_hundred_thousand_items_open_at_once(tmp_path):
    item = json.dumps({"conversations": [{"from": "human", "value": "x" * 200}, {"from": "gpt", "value": "y" * 300}]})
    (tmp_path / "a.jsonl").write_text(f"{item}\n" * 100_000)
    (tmp_path / "a.json").write_text("[" + ",\n".join([item] * 100_000) + "]")
    for name in ("a.jsonl", "a.json"):
        begin = time.perf_counter()
        records = open_records(tmp_path / name)
        assert time.perf_counter() - begin < 5
        assert (len(records), records.lines[-1]) == (100_000, 100_000)
        assert records.read(99_999) == json.loads(item)


# --------------------------------------------------------------------------- META


def test_meta(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "a.json").write_text("[]")
    (tmp_path / "there" / "b.jsonl").write_text("")
    meta = tmp_path / "there" / "meta.yaml"
    meta.write_text(
        "META:\n  -\n    path: a.json\n    type: text\n"
        "  - {path: b.jsonl, type: image_text, ratio: 0.5, root: pictures, preprocess: caption, prompt_type: None}\n"
        "  - {path: b.jsonl, type: text, prompt_type: null}\n"
    )
    assert read_meta(meta) == [
        Source(module.Path("a.json"), "text"),
        Source(tmp_path / "there" / "b.jsonl", "image_text", 0.5, "pictures", "caption", "None"),
        Source(tmp_path / "there" / "b.jsonl", "text", prompt_type="None"),
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a.json", "typ": "text"}, r"META\[0\]: unknown key 'typ'; did you mean 'type'\?"),
        ({"path": "a.json", "weight": 1}, r"META\[0\]: unknown key 'weight'; known are path, type"),
        ({"type": "text"}, r"META\[0\]: path: missing"),
        ({"path": "b.json"}, r"META\[0\]: path: b\.json: no such file, neither from /.* nor from /"),
        ({"path": "a.txt"}, r"META\[0\]: path: a\.txt: cannot be read; known are \.json, \.jsonl, \.csv, \.parquet"),
        ({"path": "a.json", "ratio": 2}, r"META\[0\]: ratio: got 2, but it must be above 0 and at most 1"),
        ({"path": "a.json", "ratio": "x"}, r"META\[0\]: ratio: got 'x'"),
        ({"path": "a.json", "root": 3}, r"META\[0\]: root: got 3, but it must be text"),
        (
            {"path": "a.json", "prompt_type": "alpacca"},
            r"prompt_type: unknown value 'alpacca'; did you mean 'alpaca'\?",
        ),
        (
            {"path": "a.json", "preprocess": "captions"},
            r"preprocess: unknown value 'captions'; did you mean 'caption'\?",
        ),
        ("a.json", r"META\[0\]: got 'a\.json', but it must have path and type"),
    ],
)
def test_mistakes_in_meta_are_told_by_their_entry(tmp_path, monkeypatch, entry, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ConfigError, match=message) as error:
        read_meta({"META": [entry]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected META, a list of files"),
        ("META: []", "expected META, a list of files"),
        ("META:\n- path: [", "not valid YAML"),
        ("META:\n- {path: x.json}\nMeta: 1", "unknown key 'Meta'; did you mean 'META'"),
    ],
)
def test_mistakes_in_the_yaml_itself(tmp_path, text, message):
    path = tmp_path / "meta.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_meta(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_meta(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("name", "text", "holds_items"),
    [
        ("a.jsonl", "", True),
        ("a.csv", "instruction,output\n", True),
        ("a.json", '[{"messages": []}]', True),
        ("a.json", '\ufeff{"output": "x"}\n{"output": "y"}\n', True),
        ("a.json", '[{"output": "' + "x" * (1 << 21) + '"}]', True),
        ("a.json", "[broken", True),
        ("a.json", '{"META": [{"path": "b.jsonl"}]}', False),
        ("a.json", '{"data_config": "b.jsonl"}', False),
        ("a.json", "META:\n- path: b.jsonl\n", False),
        ("a.yaml", "[]", False),
    ],
)
def test_a_data_file_is_told_from_a_list_of_them(tmp_path, name, text, holds_items):
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert is_data_file(tmp_path / name) is holds_items
    assert not is_data_file(tmp_path / f"absent-{name}")
    if holds_items:
        assert read_meta(tmp_path / name) == [Source(tmp_path / name)]
