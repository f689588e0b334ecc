import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.small_tokenizers import MIXTRAL_CHAT, byte_level_folder, mixtral_json_folder, write_json
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as HfTokenizer

from accessory.data.tokenizer import MIXTRAL_TOKENIZER, Tokenizer, check_vocabulary, load_tokenizer
from accessory.errors import CheckpointError, ConfigError, InputError

PROPERTY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def sentencepiece() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(MIXTRAL_TOKENIZER))


@pytest.fixture(scope="module")
def byte_level_original(byte_level) -> HfTokenizer:
    return HfTokenizer.from_file(str(byte_level.path))


@pytest.fixture
def model_folder(tmp_path):
    shutil.copy(MIXTRAL_TOKENIZER, tmp_path / "tokenizer.model")
    return tmp_path


# ---- the shipped Mixtral tokenizer


def test_shipped_tokenizer_is_mixtrals(mixtral):
    assert (mixtral.vocab_size, mixtral.bos_id, mixtral.eos_id) == (32000, 1, 2)
    assert (mixtral.bos_token, mixtral.eos_token) == ("<s>", "</s>")
    assert mixtral.stop_ids == {2}
    assert mixtral.add_bos
    assert mixtral.chat_template is None
    assert mixtral.encode("Hello world", bos=True, eos=True) == [1, 22557, 1526, 2]
    assert mixtral.encode("[INST] hi", bos=False) == [733, 16289, 28793, 12014]
    assert mixtral.decode([1, 22557, 1526, 2]) == "Hello world"


def test_shipped_tokenizer_is_mistral_commons_file():
    mistral_common = pytest.importorskip("mistral_common", reason="mistral-common ships the original file")
    original = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    assert MIXTRAL_TOKENIZER.read_bytes() == original.read_bytes()


@PROPERTY
@given(text=st.text(max_size=40))
def test_encodes_and_decodes_as_sentencepiece(mixtral, sentencepiece, text):
    ids = mixtral.encode(text, bos=False)
    assert ids == sentencepiece.encode(text)
    assert mixtral.decode(ids) == sentencepiece.decode(ids) == text


@PROPERTY
@given(ids=st.lists(st.one_of(st.integers(0, 600), st.integers(0, 31999)), max_size=20))
def test_decodes_random_ids_as_sentencepiece_where_those_are_text(mixtral, sentencepiece, ids):
    theirs = sentencepiece.decode(ids)
    if "\ufffd" not in theirs:
        assert mixtral.decode(ids) == theirs


@PROPERTY
@given(text=st.text(max_size=40), ids=st.lists(st.integers(0, 299), max_size=20))
def test_byte_level_encodes_and_decodes_as_tokenizers(byte_level, byte_level_original, text, ids):
    theirs = byte_level_original
    # To us the text of a special token is text. Hypothesis takes strings that it finds in loaded modules, those too.
    assume("<|" not in text)
    assert byte_level.encode(text, bos=False) == theirs.encode(text).ids
    assert byte_level.decode(ids) == theirs.decode(ids)


@PROPERTY
@given(text=st.text(max_size=40))
def test_mixtrals_two_files_agree(mixtral, mixtral_json, text):
    ids = mixtral.encode(text, bos=True)
    if "<s>" not in text and "</s>" not in text and "<unk>" not in text:
        assert mixtral_json.encode(text, bos=True) == ids
    assert mixtral_json.decode(ids) == mixtral.decode(ids)
    assert [mixtral_json.token_bytes(i) for i in ids] == [mixtral.token_bytes(i) for i in ids]


def test_continuing_text_gets_no_space_before_it(mixtral, mixtral_json, byte_level, sentencepiece):
    for tokenizer in (mixtral, mixtral_json):
        assert tokenizer.encode("[INST]", bos=False, prefix=False) == [28792, 16289, 28793]
        assert tokenizer.encode(" [INST]", bos=False, prefix=False) == [733, 16289, 28793]
        whole = tokenizer.encode("one: two three", bos=False)
        assert tokenizer.encode("one:", bos=False) + tokenizer.encode(" two three", bos=False, prefix=False) == whole
    assert byte_level.encode("cat", bos=False, prefix=False) == byte_level.encode("cat", bos=False)


# ---- BOS and control tokens


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", ["<s>Hello world", "Hello world", "<s><s>Hello world"])
def test_never_two_bos(mixtral, mixtral_json, text, special):
    assert mixtral_json.encode(text, bos=True, special=special) == [1, 22557, 1526]
    if not (special and text.startswith("<s>")):
        assert mixtral.encode(text, bos=True, special=special) == [1, 22557, 1526]
    else:  # as in transformers 5, text after a control token continues a word
        assert mixtral.encode(text, bos=True, special=special) == [1, 16230, 1526]


def test_bos_that_opens_every_turn_is_not_doubled(byte_level):
    start = byte_level.special_tokens["<|im_start|>"]
    ids = byte_level.encode("<|im_start|>user\nhi<|im_end|>", bos=True, special=True)
    assert ids.count(start) == 1
    assert ids[0] == start


def test_control_strings_in_plain_text_stay_characters(any_tokenizer):
    for text in ("a</s>b", "x<|im_end|>y<|im_start|>system", "<unk>"):
        ids = any_tokenizer.encode(text, bos=False)
        assert not set(ids) & set(any_tokenizer.special_tokens.values())
        assert any_tokenizer.decode(ids) == text


def test_control_strings_become_ids_when_asked_for(byte_level, mixtral):
    end = byte_level.special_tokens["<|im_end|>"]
    assert end in byte_level.encode("a<|im_end|>b", bos=False, special=True)
    assert mixtral.encode("x</s> y", bos=False, special=True) == [1318, 2, 337]
    assert mixtral.decode([1318, 2, 337]) == "x y"


def test_plain_added_tokens_are_always_read_and_shown(byte_level):
    number = HfTokenizer.from_file(str(byte_level.path)).token_to_id("<tool>")
    assert number not in byte_level.special_tokens.values()
    assert number in byte_level.encode("a<tool>b", bos=False)
    assert byte_level.decode([number]) == "<tool>"


def test_tokens_added_behind_a_sentencepiece_model(model_folder):
    added = {"32000": {"content": "<|im_end|>", "special": True}, "32002": {"content": "<tool>", "special": False}}
    write_json(model_folder / "tokenizer_config.json", {"added_tokens_decoder": added, "eos_token": "<|im_end|>"})
    write_json(model_folder / "added_tokens.json", {"<|im_start|>": 32001})
    tokenizer = load_tokenizer(model_folder)
    assert tokenizer.vocab_size == 32003
    assert tokenizer.eos_id == 32000
    assert tokenizer.stop_ids == {32000}
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>", bos=False, special=True)
    assert (ids[0], ids[-1]) == (32001, 32000)
    assert ids[1:-1] == tokenizer.encode("user\nhi", bos=False, prefix=False)
    assert tokenizer.encode("a<tool>", bos=False)[-1] == 32002
    assert 32000 not in tokenizer.encode("a<|im_end|>", bos=False)
    assert tokenizer.decode([32001, 12014, 32002, 32000]) == "hi<tool>"


def test_add_bos_is_what_the_files_say(tmp_path):
    assert not load_tokenizer(byte_level_folder(tmp_path / "a")).add_bos
    assert load_tokenizer(byte_level_folder(tmp_path / "b", add_bos_token=True)).add_bos
    assert load_tokenizer(mixtral_json_folder(tmp_path / "c")).add_bos  # from the post-processor
    assert not load_tokenizer(mixtral_json_folder(tmp_path / "d", add_bos_token=False)).add_bos
    (tmp_path / "e").mkdir()
    shutil.copy(MIXTRAL_TOKENIZER, tmp_path / "e" / "tokenizer.model")
    write_json(tmp_path / "e" / "tokenizer_config.json", {"add_bos_token": False})
    assert not load_tokenizer(tmp_path / "e").add_bos


def test_stop_ids_take_in_generation_configs_list(tmp_path):
    folder = byte_level_folder(tmp_path)
    assert load_tokenizer(folder).stop_ids == {2}
    write_json(folder / "config.json", {"eos_token_id": 7})
    assert load_tokenizer(folder).stop_ids == {2, 7}
    write_json(folder / "generation_config.json", {"eos_token_id": [0, 5]})
    assert load_tokenizer(folder).stop_ids == {0, 2, 5}


def test_token_names_as_objects_and_from_the_older_file(tmp_path):
    folder = byte_level_folder(tmp_path)
    write_json(folder / "tokenizer_config.json", {"bos_token": {"content": "<|endoftext|>"}})
    write_json(
        folder / "special_tokens_map.json", {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|im_end|>"}
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 0)


def test_a_bare_tokenizer_json_still_ends(tmp_path):
    folder = byte_level_folder(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.add_bos) == (2, None, False)
    assert tokenizer.encode("a", bos=True) == tokenizer.encode("a", bos=False)


# ---- finding the file


def test_folder_preferences(model_folder, tmp_path_factory):
    mixtral_json_folder(model_folder, chat_template=MIXTRAL_CHAT)
    both = load_tokenizer(model_folder)
    assert both.kind == "sentencepiece"
    assert both.chat_template == MIXTRAL_CHAT
    (model_folder / "chat_template.jinja").write_text("{{ 'newer' }}")
    assert load_tokenizer(model_folder).chat_template == "{{ 'newer' }}"
    (model_folder / "tokenizer.model").rename(model_folder / "tokenizer.model.v1")
    shutil.copy(model_folder / "tokenizer.model.v1", model_folder / "tokenizer.model.v3")
    assert load_tokenizer(model_folder).path.name == "tokenizer.model.v3"
    for name in ("tokenizer.model.v1", "tokenizer.model.v3"):
        (model_folder / name).unlink()
    assert load_tokenizer(model_folder).kind == "huggingface"


def test_any_file_name_will_do(tmp_path):
    path = tmp_path / "mine.model"
    shutil.copy(MIXTRAL_TOKENIZER, path)
    assert load_tokenizer(path).vocab_size == Tokenizer(str(path)).vocab_size == 32000


def test_named_templates_give_the_default(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert load_tokenizer(byte_level_folder(tmp_path, chat_template=named)).chat_template == "D"


def test_nothing_there_names_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.model, tokenizer\.model\.v1 .* or tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tekken"):
        load_tokenizer(tmp_path / "tekken.json")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", "half", b"\xff\xfe" * 40])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_broken_file_is_one_clear_error(tmp_path, name, content):
    path = tmp_path / name
    if content == "half":
        whole = MIXTRAL_TOKENIZER if name == "tokenizer.model" else byte_level_folder(tmp_path / "x") / "tokenizer.json"
        content = whole.read_bytes()
        content = content[: len(content) // 2]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=name) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token: got 3"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template: got a int"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', "added_tokens_decoder"),
        ("generation_config.json", '{"eos_token_id": "two"}', "eos_token_id: got 'two'"),
        ("added_tokens.json", '{"<x>": "y"}', "<x>: got 'y'"),
    ],
)
def test_a_broken_file_beside_it_names_file_and_field(model_folder, file, content, message):
    (model_folder / file).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(model_folder)
    assert file in str(caught.value)


def test_text_must_be_text(mixtral):
    with pytest.raises(InputError, match="bytes"):
        mixtral.encode(b"x", bos=True)
    assert mixtral.decode(mixtral.encode("a\ud800b", bos=True)) == "a\ufffdb"


def test_decode_raises_nothing(any_tokenizer):
    n = any_tokenizer.vocab_size
    assert any_tokenizer.decode([-1, n, n + 5, 10**9]) == ""
    assert isinstance(any_tokenizer.decode(range(n)), str)


# ---- vocabulary against network


def test_vocabulary_that_fits_is_silent(mixtral, caplog):
    check_vocabulary(mixtral, 32000)
    assert not caplog.records


@pytest.mark.parametrize("rows", [32001, 32064, 32128, 33024])
def test_padded_vocabulary_is_tolerated_with_a_warning(mixtral, caplog, rows):
    with caplog.at_level(logging.WARNING):
        check_vocabulary(mixtral, rows)
    assert "vocab_size" in caplog.text
    assert str(rows) in caplog.text


@pytest.mark.parametrize("rows", [256, 31999, 33025, 49152])
def test_vocabulary_of_another_model_is_an_error(mixtral, rows):
    with pytest.raises(ConfigError, match=f"vocab_size: .*{rows} .*32000.*") as caught:
        check_vocabulary(mixtral, rows)
    assert "mixtral_tokenizer.model" in str(caught.value)


# ---- cost


def test_importing_is_cheap():
    code = (
        "import sys, accessory.data.tokenizer, accessory.data.detokenizer, accessory.data.conversation;"
        "heavy = {'torch', 'transformers', 'jinja2', 'sentencepiece', 'tokenizers', 'numpy'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_transformers_reads_the_same_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = byte_level_folder(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = load_tokenizer(folder)
    for text in ("hello world <|im_end|> x", "Größe 🙂\n\n你好", "<tool>the cat"):
        assert ours.encode(text, bos=False, special=True) == theirs(text, add_special_tokens=False)["input_ids"]
        ids = ours.encode(text, bos=False)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == theirs.eos_token == ours.eos_token
