"""The chat template that comes with the weights, against transformers and mistral-common."""

import shutil
import sys

import pytest
from helpers.dialogues import HI, MORE, dialogue, learnt, mistral_common_ids
from helpers.small_tokenizers import CHATML, MIXTRAL_CHAT, byte_level_folder, mixtral_json_folder, write_json

from accessory.data.chat_template import TokenizerTemplate
from accessory.data.templates import get_template
from accessory.data.tokenizer import MIXTRAL_TOKENIZER, load_tokenizer
from accessory.errors import InputError, MissingExtraError

OTHERS = [
    dialogue("the cat", "sat on", "the mat"),
    dialogue("Größe 🙂", "你好", "hello\n\n world ", system="hello"),
    dialogue("hello"),
]


@pytest.mark.parametrize("messages", OTHERS)
def test_own_template_equals_transformers(tmp_path, messages):
    transformers = pytest.importorskip("transformers")
    folder = byte_level_folder(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    template = get_template(None, ours)
    assert template.name == "tokenizer"
    assert template.text(messages, prompt=True) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert template.prompt_ids(messages, ours) == wanted
    whole = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert template.encode(messages, ours)[0] == whole


@pytest.mark.parametrize("metaspace", [None, "first", "always"])
def test_own_mixtral_template_equals_transformers_and_mistral_common(tmp_path, metaspace):
    transformers = pytest.importorskip("transformers")
    folder = mixtral_json_folder(tmp_path, metaspace=metaspace, chat_template=MIXTRAL_CHAT)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    messages = dialogue("hi", "Hello there", "more")
    wanted = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    ours = load_tokenizer(folder)
    template = get_template("tokenizer", ours)
    assert template.prompt_ids(messages, ours) == wanted
    assert template.prompt_ids(messages, ours).count(1) == 1
    assert template.reply_space == " "
    if metaspace:  # the older files add a space before the template's
        assert wanted == mistral_common_ids("v1", messages)


@pytest.mark.parametrize("legacy", [None, False, True])
def test_own_mixtral_template_beside_a_sentencepiece_model(tmp_path, legacy):
    shutil.copy(MIXTRAL_TOKENIZER, tmp_path / "tokenizer.model")
    config = {"chat_template": MIXTRAL_CHAT, "bos_token": "<s>", "eos_token": "</s>"}
    write_json(tmp_path / "tokenizer_config.json", config if legacy is None else config | {"legacy": legacy})
    tokenizer = load_tokenizer(tmp_path)
    template = get_template("tokenizer", tokenizer)
    messages = dialogue("hi", "Hello", "more")
    # transformers 5 gives these ids with any `legacy`, because the template writes its own spaces.
    first, answer = [1, *HI], [22557, 2]
    assert template.prompt_ids(messages, tokenizer) == [*first, *answer, *MORE]
    assert template.prompt_ids(messages[:1], tokenizer) == first
    ids, mask = template.encode(messages[:2], tokenizer)
    assert ids == [*first, *answer]
    assert learnt(ids, mask, tokenizer) == [" Hello</s>"]


def test_own_template_learns_answers_with_their_end(byte_level):
    messages = dialogue("the cat", "sat", "on the mat", "hello", system="S")
    template = get_template("tokenizer", byte_level)
    ids, mask = template.encode(messages, byte_level)
    assert learnt(ids, mask, byte_level) == ["sat<|im_end|>", "hello<|im_end|>"]
    assert (ids, mask) == get_template("chatml").encode(messages, byte_level)


def own(tmp_path, source):
    return get_template("tokenizer", load_tokenizer(byte_level_folder(tmp_path, chat_template=source)))


def test_own_template_has_what_templates_expect(tmp_path):
    source = (
        "{% for m in messages %}\n  {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}\n\n{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    assert own(tmp_path, source).text(dialogue("é<b>")) == '"é<b>"\n4'


def test_own_template_refusals(tmp_path):
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        own(tmp_path / "a", MIXTRAL_CHAT).text([*dialogue("a"), *dialogue("b")])
    with pytest.raises(InputError, match="not valid Jinja"):
        own(tmp_path / "b", "{% for %}")
    with pytest.raises(InputError, match="cannot write"):
        own(tmp_path / "c", "{{ messages.nothing.at_all }}").text(dialogue("a"))
    with pytest.raises(InputError, match="cannot write"):  # the sandbox
        own(tmp_path / "d", "{{ ''.__class__.__mro__ }}").text(dialogue("a"))
    tokenizer = load_tokenizer(byte_level_folder(tmp_path / "e"))
    rewriting = TokenizerTemplate(
        "{% for m in messages %}{{ m.content if loop.last else 'gone' }}{% endfor %}", tokenizer
    )
    with pytest.raises(InputError, match=r"messages\[1\].*differently"):
        rewriting.encode(dialogue("a", "b", "c"), tokenizer)


def test_own_template_without_jinja_says_what_to_install(byte_level, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match="pip install jinja2"):
        get_template("tokenizer", byte_level)


def test_own_template_wins_unless_another_is_named(byte_level, mixtral):
    assert byte_level.chat_template == CHATML
    assert get_template(None, byte_level).name == "tokenizer"
    assert get_template(None, mixtral).name == get_template(None).name == "default"
    assert get_template("alpaca", byte_level).name == "alpaca"
    with pytest.raises(InputError, match=r"mixtral_tokenizer\.model comes without one"):
        get_template("tokenizer", mixtral)
