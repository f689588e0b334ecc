"""The built-in templates as Jinja: transformers writes with it what our classes write, and we recognise it."""

import json
import shutil
from pathlib import Path

import jinja2
import pytest
from helpers.dialogues import dialogue, mistral_common_ids
from helpers.examples import examples
from helpers.small_tokenizers import byte_level_folder, mixtral_json_folder, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accessory.data.chat_template import TokenizerTemplate
from accessory.data.template_base import BOS, EOS
from accessory.data.template_names import BUILT_IN
from accessory.data.templates import get_template, usual_name
from accessory.data.tokenizer import load_tokenizer
from accessory.data.tokenizer_files import files_with_template
from accessory.errors import InputError

transformers = pytest.importorskip("transformers")
PROPERTY = settings(
    max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# White space and line ends matter to templates, and so do their own markers.
TEXTS = st.text(max_size=8) | st.sampled_from(["", " ", "\n", " a\n", "###", "{{ x }}", "</s>", "[INST]", "{% if"])


@pytest.fixture(scope="module", params=["byte_level", "mixtral_json"])
def folders(request, tmp_path_factory):
    """A template's name -> its folder with the tokenizer, ours and transformers'."""
    made = {}
    for name in BUILT_IN:
        make = byte_level_folder if request.param == "byte_level" else mixtral_json_folder
        folder = make(tmp_path_factory.mktemp(name))
        template = get_template(name)
        source = template.jinja(load_tokenizer(folder))
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
        made[name] = (template, load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder))
    return made


@pytest.mark.parametrize("name", BUILT_IN)
@PROPERTY
@given(turns=st.lists(TEXTS, min_size=1, max_size=6), system=st.none() | TEXTS)
def test_transformers_writes_the_same_text(folders, name, turns, system):
    template, ours, theirs = folders[name]
    messages = dialogue(*turns, system=system)
    prompt = bool(len(turns) % 2)
    text = template.text(messages, prompt=prompt)
    if name == "mistral":
        text = text.removeprefix(BOS)
    begin = BOS if template.begins_with_bos(ours) else ""
    shown = {"bos_token": BOS, "eos_token": EOS}  # as `text` shows them
    found = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **shown)
    assert found == begin + text


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "mistral"])
def test_transformers_asks_with_the_ids_that_were_learnt_from(folders, name):
    template, ours, theirs = folders[name]
    messages = dialogue("the cat", system="Be brief.")
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == template.prompt_ids(messages, ours)


@pytest.mark.parametrize("metaspace", ["first", "always"])
def test_mistral_in_transformers_has_the_ids_of_mistral_common(tmp_path, metaspace):
    folder = mixtral_json_folder(tmp_path, metaspace=metaspace)  # the older files add a space before the template's
    (folder / "chat_template.jinja").write_text(get_template("mistral").jinja(load_tokenizer(folder)))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    messages = dialogue("hi", "Hello there", "more", system="Be brief.")
    ids = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids == mistral_common_ids("v1", messages)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_mistral_with_control_tokens_has_the_ids_of_mistral_common_v3(tmp_path, system):
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    shutil.copy(data / "mistral_instruct_tokenizer_240323.model.v3", tmp_path / "tokenizer.model.v3")
    template, messages = get_template("mistral"), dialogue("hi", "Hello there ", "more", system=system)
    (tmp_path / "chat_template.jinja").write_text(template.jinja(load_tokenizer(tmp_path)))
    tokenizer = load_tokenizer(tmp_path)
    rendered = TokenizerTemplate(tokenizer.chat_template, tokenizer)
    assert rendered.prompt_ids(messages, tokenizer) == mistral_common_ids("v3", messages)
    for whole in (messages[:-1], [*messages, {"role": "assistant", "content": "Good"}]):
        ids = tokenizer.encode(rendered.text(whole), bos=False, special=True)
        assert ids == template.encode(whole, tokenizer)[0]
    assert usual_name(tokenizer) == "mistral"


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("chosen", [None, "tokenizer"])
def test_a_folder_with_the_jinja_of_a_built_in_template_has_that_template(folders, name, chosen):
    template, ours, _ = folders[name]
    assert usual_name(ours) == name
    found = get_template(chosen, ours)
    assert type(found) is type(template)
    assert found.stop_strings == template.stop_strings


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("trims", [True, False])
def test_plain_jinja_writes_it_too_and_nothing_for_an_end_that_a_tokenizer_lacks(folders, name, trims):
    template, ours, _ = folders[name]
    environment = jinja2.Environment(trim_blocks=trims, lstrip_blocks=trims)
    messages = dialogue("hi", "Hello\n", "more", "Good", system="Be brief.")
    found = environment.from_string(template.jinja(ours)).render(messages=messages)
    assert found == template.text(messages).replace(BOS, "").replace(EOS, "")


def test_templates_in_json_files_give_way(tmp_path):
    named = [{"name": "default", "template": "own"}, {"name": "tool_use", "template": "other"}]
    write_json(tmp_path / "tokenizer_config.json", {"legacy": False, "chat_template": named})
    write_json(tmp_path / "chat_template.json", {"chat_template": "own"})
    write_json(tmp_path / "special_tokens_map.json", {})
    texts = files_with_template("new", sorted(tmp_path.iterdir()))
    assert texts.pop("chat_template.jinja") == "new"
    assert {name: json.loads(text) for name, text in texts.items()} == {
        "tokenizer_config.json": {"legacy": False, "chat_template": "new"},
        "chat_template.json": {"chat_template": "new"},
    }
    assert files_with_template("own", sorted(tmp_path.iterdir())) == {"chat_template.jinja": "own"}


@pytest.mark.parametrize(("chosen", "shown"), [(None, "default"), ("alpaca", "alpaca")])
def test_the_pages_begin_with_it(folders, chosen, shown):
    pytest.importorskip("gradio")
    from accessory.server.page_kinds import served_dialogue

    template, _ = served_dialogue(chosen, images=False).settings(folders["default"][1])
    assert template.value == shown


def test_another_name_is_stronger(folders):
    assert get_template("alpaca", folders["default"][1]).name == "alpaca"


def test_a_template_that_was_changed_is_the_tokenizers_own(tmp_path):
    folder = byte_level_folder(tmp_path)
    source = get_template("default").jinja(load_tokenizer(folder))
    (folder / "chat_template.jinja").write_text(source.replace("Human", "User"), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert usual_name(tokenizer) == "tokenizer"
    assert " User: hi\n###" in get_template(None, tokenizer).text(dialogue("hi"))
    assert get_template(None, tokenizer).jinja(tokenizer) == tokenizer.chat_template


@pytest.mark.parametrize("name", ["default", "alpaca", "mistral"])
@pytest.mark.parametrize(
    "roles", [["assistant"], ["user", "user"], ["system"], ["system", "system", "user"], ["user", "system"]]
)
def test_turns_out_of_order_are_refused(folders, name, roles):
    template, ours, theirs = folders[name]
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(InputError):
        template.text(messages)
    with pytest.raises(Exception, match=r"take turns|only a system"):
        theirs.apply_chat_template(messages, tokenize=False)
    with pytest.raises(InputError, match=r"take turns|only a system"):
        TokenizerTemplate(template.jinja(ours), ours).text(messages)
