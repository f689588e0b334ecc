"""The finished folder keeps the template that it was trained with; what is made of it keeps it, and chats use it."""

import json
import shutil

import pytest
from helpers import runs
from helpers.command_line import standard_input
from helpers.dialogues import dialogue

from accessory.cli import main
from accessory.convert.convert import convert
from accessory.convert.merge import merge
from accessory.convert.peft_format import export_adapter
from accessory.convert.quantize import quantize_checkpoint
from accessory.data.templates import get_template, usual_name
from accessory.data.tokenizer import load_tokenizer
from accessory.formats import Quant
from accessory.model.meta import MetaModel
from accessory.train.config import FinetuneConfig
from accessory.train.run import finetune

LORA = {"llama_type": "mixtral_sparse_peft", "lora_rank": 4, "lora_alpha": 8.0}


@pytest.fixture
def train(inputs, tmp_path, capsys):
    """Train for a step; returns the finished folder, and what was printed of its template."""

    def run(name="run", **changes):
        with runs.without_charts():
            final = finetune(
                FinetuneConfig(**runs.options(inputs, tmp_path / name, **{"max_steps": 1, "max_words": 400, **changes}))
            )
        told = [line for line in capsys.readouterr().out.splitlines() if "chat template" in line]
        return final, told

    return run


def without_template(folder, copy):
    """A copy of a model's folder whose tokenizer has no chat template."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("name", ["default", "alpaca", "chatml"])
def test_the_template_is_kept_and_wins_over_the_models_own(train, name):
    final, told = train(template=name)
    assert told == [
        f"{final}: its chat template is {name}, which it was trained with; the tokenizer came with another one"
    ]
    tokenizer = load_tokenizer(final)
    assert get_template(None, tokenizer).name == name
    config = json.loads((final / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (final / "chat_template.jinja").read_text()
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(final)
    messages = dialogue("the cat", system="Be brief.")
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == get_template(name).prompt_ids(messages, tokenizer)


def test_a_recipe_without_a_template_keeps_default(train, inputs, tmp_path):
    plain = without_template(inputs / "model", tmp_path / "plain")
    final, told = train(template=None, pretrained_path=[str(plain)])
    assert told == [f"{final}: its chat template is default, which it was trained with"]
    assert usual_name(load_tokenizer(final)) == "default"
    assert "chat_template" not in json.loads((final / "tokenizer_config.json").read_text())


def test_the_models_own_template_stays(train, inputs):
    final, told = train(template="tokenizer")
    assert told == []
    assert load_tokenizer(final).chat_template == load_tokenizer(inputs / "model").chat_template


@pytest.mark.parametrize("how", [{"dialog": False}, {"prompt_type": "alpaca"}])
def test_prompts_of_single_turns_say_nothing_of_dialogues(train, inputs, how):
    own = load_tokenizer(inputs / "model").chat_template
    final, told = train(template=None, **how)
    assert (told, load_tokenizer(final).chat_template) == ([], own)
    final, _ = train("named", template="default", **how)
    assert usual_name(load_tokenizer(final)) == "default"


def test_a_template_of_a_file_alone_goes_with_it(train, inputs, tmp_path):
    """Of a tokenizer that is named by its file, only the file comes along."""
    final, _ = train(template="tokenizer", tokenizer_path=str(inputs / "model" / "tokenizer.json"))
    assert load_tokenizer(final).chat_template == load_tokenizer(inputs / "model").chat_template


def test_what_is_made_of_an_adapter_keeps_it(train, inputs, tmp_path):
    base = inputs / "model"
    final, _ = train(template="default", only_save_trainable=True, **LORA)
    merge([base, final], tmp_path / "merged", progress=False, allow_unchanged=True)
    convert(tmp_path / "merged", tmp_path / "hf", to="hf", progress=False)
    convert(tmp_path / "merged", tmp_path / "base", to="base", progress=False)
    quantize_checkpoint(tmp_path / "merged", tmp_path / "int8", Quant("int8"), progress=False)
    export_adapter(final, tmp_path / "peft", base=base)
    for name in ("merged", "hf", "base", "int8", "peft"):
        tokenizer = load_tokenizer(tmp_path / name)
        assert usual_name(tokenizer) == "default"
        assert "' Human: '" in json.loads((tmp_path / name / "tokenizer_config.json").read_text())["chat_template"]


@pytest.mark.parametrize(("words", "name"), [([], "default"), (["--template", "chatml"], "chatml")])
def test_a_chat_uses_it_unless_another_is_named(train, inputs, monkeypatch, capsys, words, name):
    base = inputs / "model"
    final, _ = train(template="default", only_save_trainable=True, **LORA)
    prompts, stops = [], []
    stream = MetaModel.stream

    def recorded(self, prompt, **how):
        prompts.append(prompt)
        stops.append(how["additional_stop_symbols"])
        return stream(self, prompt, **how)

    monkeypatch.setattr(MetaModel, "stream", recorded)
    standard_input(monkeypatch, "the cat\n")
    how = ["--dtype", "fp32", "--device", "cpu", "--max-seq-len", "400", "--max-gen-len", "2"]
    assert main(["chat", str(base), str(final), *how, *words]) == 0
    assert capsys.readouterr().out.startswith(f"Template {name}.")
    template = get_template(name)
    assert prompts == [template.prompt_ids(dialogue("the cat"), load_tokenizer(base))]
    assert stops == [list(template.stop_strings)]
