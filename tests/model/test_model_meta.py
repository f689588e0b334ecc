"""`MetaModel` on folders of every layout, against transformers on the same weights and ids."""

import itertools
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from helpers import checkpoints as make
from helpers.random_models import canonical_from_hf, hf_mixtral, write_speaking
from helpers.sizes import SPEAKING

from accessory.convert.convert import convert
from accessory.data.tokenizer import MIXTRAL_TOKENIZER
from accessory.errors import AccessoryError, ConfigError, InputError
from accessory.model.meta import MetaModel
from accessory.model.writing import TextRequest

ARGS = SPEAKING
PROMPT = "The best programming language in the world is"
LAYOUTS = {
    "hf": {},
    "torrent": {"to": "torrent"},
    "base of 4": {"to": "base", "shards": 4},
    "base of 1": {"to": "base", "shards": 1},
    "sparse of 4": {"to": "sparse", "shards": 4},
    "sparse of 2, safetensors": {"to": "sparse", "shards": 2, "safetensors": True},
}


# Written by hand from the published facts, not by this project's writers.
FOREIGN = {
    "torrent in pieces": lambda path, tensors: make.split_into_pieces(
        make.write_torrent(path, tensors, ARGS) / "consolidated.00.pth", 10
    ),
    "official, one .pth": lambda path, tensors: make.write_official(path, tensors, ARGS),
    "official, eight .pt": lambda path, tensors: make.write_official(path, tensors, ARGS, form="pt"),
    "official, safetensors": lambda path, tensors: make.write_official(path, tensors, ARGS, form="safetensors"),
    "hf, sharded and fused": lambda path, tensors: make.write_hf(path, tensors, ARGS, files=3, fused=True),
    "base of 2, bare": lambda path, tensors: make.write_accessory(path, tensors, "base", ARGS, world=2, nested=False),
    "sparse of 1, no meta": lambda path, tensors: make.write_accessory(
        path, tensors, "sparse", ARGS, world=1, meta=False
    ),
}


@pytest.fixture(scope="module")
def folders(oracle, tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    write_speaking(root / "hf", ARGS)
    for name, how in LAYOUTS.items():
        if how:
            convert(root / "hf", root / name, progress=False, **how)
    tensors = canonical_from_hf(oracle)
    for name, write in FOREIGN.items():
        write(root / name, tensors)
        shutil.copy(MIXTRAL_TOKENIZER, root / name / "tokenizer.model")
    return root


@pytest.fixture(scope="module")
def model(folders):
    return load(folders / "base of 4")


def load(path, **options):
    return MetaModel.from_pretrained(path, **{"dtype": torch.float32, "device": "cpu", "max_seq_len": 256, **options})


def oracle_ids(oracle, ids, n):
    return oracle.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False, pad_token_id=0)[
        0, len(ids) :
    ].tolist()


@pytest.mark.parametrize("layout", [*LAYOUTS, *FOREIGN])
@pytest.mark.parametrize("llama_type", [None, "mixtral", "mixtral_sparse"])
def test_every_layout_gives_transformers_logits_and_text(folders, oracle, layout, llama_type):
    model = load(folders / layout, llama_type=llama_type)
    declared = "base" if layout.startswith("base") else "sparse"
    assert model.llma.implementation == {None: declared, "mixtral": "base", "mixtral_sparse": "sparse"}[llama_type]
    ids = model.tokenizer.encode(PROMPT, bos=True)
    with torch.no_grad():
        theirs = oracle(torch.tensor([ids])).logits[0]
    ours = model.compute_logits([PROMPT])[0]
    assert ((ours - theirs).norm() / theirs.norm()).item() <= 1e-5
    expected = model.tokenizer.decode(oracle_ids(oracle, ids, 12), after=ids)
    assert model.generate([PROMPT], max_gen_len=12) == [expected]


def test_the_seeds_call_as_written(folders):
    model = MetaModel.from_pretrained(str(folders / "base of 4"), max_seq_len=2048, mp_group=None)
    assert model.llma.tok_embeddings.weight.dtype == torch.bfloat16
    response = model.generate([PROMPT], images=None, max_gen_len=8)[0]
    shown = [item["text"] for item in model.stream_generate(PROMPT, image=None, max_gen_len=8)]
    assert shown[-1] == response


def test_a_batch_gives_each_prompt_what_it_gets_alone(model):
    prompts = [PROMPT, "A", "Zwei Wörter und noch ein paar mehr, damit es länger wird"]
    assert model.generate(prompts, max_gen_len=16) == [model.generate([p], max_gen_len=16)[0] for p in prompts]


def test_streaming_grows_to_the_whole(model):
    items = list(model.stream_generate(PROMPT, max_gen_len=40, temperature=1.5, seed=3))
    assert [i["end_of_content"] for i in items] == [False] * (len(items) - 1) + [True]
    for a, b in itertools.pairwise(items):
        assert b["text"].startswith(a["text"])
    assert items[-1]["text"] == model.generate([PROMPT], max_gen_len=40, temperature=1.5, seed=3)[0]


def test_stop_symbols_end_the_text_and_never_show(model):
    whole = model.generate([PROMPT], max_gen_len=30)[0]
    stop = whole[len(whole) // 2 :][:4]
    expected = whole[: whole.index(stop)]
    assert model.generate([PROMPT], max_gen_len=30, additional_stop_symbols=[stop]) == [expected]
    shown = [i["text"] for i in model.stream_generate(PROMPT, max_gen_len=30, additional_stop_symbols=(stop,))]
    assert shown[-1] == expected
    assert all(expected.startswith(text) for text in shown)


def test_end_of_sequence_ends_the_text(model, monkeypatch):
    ids = model.tokenizer.encode(PROMPT, bos=True)
    tokens = []
    for token in oracle_ids(hf_mixtral(ARGS, std=0.2), ids, 12):
        tokens.append(token)
    third = tokens[2]
    monkeypatch.setattr(model.tokenizer, "stop_ids", frozenset({third}))
    expected = model.tokenizer.decode(tokens[: tokens.index(third)], after=ids)
    assert model.generate([PROMPT], max_gen_len=12) == [expected]


def test_token_ids_may_be_arrays(model):
    ids = model.tokenizer.encode(PROMPT, bos=True)
    for given in (torch.tensor(ids), np.array(ids, dtype=np.int32), tuple(ids)):
        assert model.generate([given], max_gen_len=3) == model.generate([ids], max_gen_len=3)


def test_one_bos_never_two(model):
    for prompt in (PROMPT, "<s>" + PROMPT, "<s> [INST] Hi [/INST]"):
        ids = model.writing(TextRequest(prompt, max_gen_len=8)).request.ids
        assert ids[0] == model.tokenizer.bos_id
        assert ids.count(model.tokenizer.bos_id) == 1


def test_sampling_repeats_under_a_seed(model):
    draw = [model.generate([PROMPT], max_gen_len=20, temperature=1.0, top_p=0.9, seed=s)[0] for s in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    torch.manual_seed(5)
    a = model.generate([PROMPT], max_gen_len=20, temperature=1.0)
    torch.manual_seed(5)
    assert a == model.generate([PROMPT], max_gen_len=20, temperature=1.0)


def test_a_prompt_of_40_000_tokens_is_cut_from_the_left(model, caplog):
    words = "one two three four " * 10_000
    with caplog.at_level(logging.WARNING):
        text = model.generate([words], max_gen_len=8)[0]
    assert "max_seq_len = 256" in caplog.text
    ids = model.tokenizer.encode(words, bos=True)
    assert len(ids) > 40_000
    assert text == model.generate([[1, *ids[-(256 - 8 - 1) :]]], max_gen_len=8)[0]


def test_later_folders_replace_tensors_of_earlier_ones(folders, model, tmp_path):
    trained = torch.full((32000, 32), 0.5)
    torch.save({"model": {"llma.output.weight": trained}}, tmp_path / "consolidated.00-of-01.model.pth")
    both = load([folders / "base of 4", tmp_path])
    assert torch.equal(both.llma.output.weight, trained)
    assert torch.equal(both.llma.tok_embeddings.weight, model.llma.tok_embeddings.weight)


def test_config_files_win_and_disagreement_names_the_field(folders, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"rope_theta": 1e4, "norm_eps": 1e-3}))
    (tmp_path / "b.json").write_text(json.dumps({"norm_eps": 1e-4}))
    model = load(folders / "hf", llama_config=[tmp_path / "a.json", tmp_path / "b.json"])
    assert (model.args.rope_theta, model.args.norm_eps) == (1e4, 1e-4)
    (tmp_path / "c.json").write_text(json.dumps({"hidden_dim": 64}))
    with pytest.raises(AccessoryError, match="hidden_dim"):
        load(folders / "hf", llama_config=tmp_path / "c.json")


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda m: m.generate([""]), r"prompts\[0\]"),
        (lambda m: m.generate([]), "prompts"),
        (lambda m: m.generate("one string"), "prompts"),
        (lambda m: m.generate([PROMPT], max_gen_len=0), "max_gen_len"),
        (lambda m: m.generate([PROMPT], max_gen_len=256), "max_gen_len"),
        (lambda m: m.generate([PROMPT], max_gen_len=4, temperature=-1), "temperature"),
        (lambda m: m.generate([PROMPT], max_gen_len=4, temperature=0.5, top_p=0), "top_p"),
        (lambda m: m.generate([PROMPT], max_gen_len=4, temperature=0.5, top_p=1.5), "top_p"),
        (lambda m: m.generate([[1, 32000]], max_gen_len=4), "32000"),
        (lambda m: m.generate([PROMPT], max_gen_len=4, additional_stop_symbols=[""]), "stop"),
        (lambda m: m.generate([PROMPT], images=torch.zeros(1, 3, 224, 224)), "images"),
        (lambda m: m.generate([None], max_gen_len=4), r"prompts\[0\]: got a NoneType"),
        (lambda m: m.generate([[1], [1, 2.5]], max_gen_len=4), r"prompts\[1\]: got a list; .* whole numbers"),
        (lambda m: next(m.stream_generate("", max_gen_len=4)), r"prompts\[0\]"),
    ],
)
def test_bad_input_is_one_error_naming_it(model, call, names):
    with pytest.raises(InputError, match=names) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    write_speaking(tmp_path, ARGS.replace(vocab_size=300))
    with pytest.raises(ConfigError, match="32000"):
        load(tmp_path)


def test_a_vocabulary_far_larger_than_the_tokenizers_is_refused(tmp_path):
    write_speaking(tmp_path, ARGS.replace(vocab_size=40000))
    with pytest.raises(ConfigError, match="vocab_size"):
        load(tmp_path)


def test_a_group_without_torch_distributed_is_refused(folders):
    with pytest.raises(ConfigError, match=r"mp_group: call torch\.distributed"):
        load(folders / "hf", mp_group=object())


def test_an_unknown_llama_type_lists_what_would_do(folders):
    with pytest.raises(ConfigError, match="llama_type: got 'llama'"):
        load(folders / "hf", llama_type="llama")
