"""Tokenizers as GGUF's metadata: the same ids, scores and types again, and how a text is cut by llama.cpp's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import checkpoints as make
from helpers.small_tokenizers import byte_level_folder, mixtral_json_folder

from accessory.convert import gguf_tokenizer
from accessory.convert.gguf_vocabulary import vocabulary
from accessory.data.tokenizer import MIXTRAL_TOKENIZER, load_tokenizer
from accessory.errors import CheckpointError

gguf = pytest.importorskip("gguf")

V = 352  # ids
TEXTS = ["Hello world, hello there!", "  two  spaces", "Größe, 你好 and 🙂", "don't stop\nat 12345"]


def sentencepiece_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(MIXTRAL_TOKENIZER.read_bytes())
    return folder


@pytest.mark.parametrize("form", [sentencepiece_folder, mixtral_json_folder])
def test_sentencepiece_vocabularies_give_the_same_ids_again(tmp_path, form):
    found = vocabulary(form(tmp_path / "theirs"), 32002)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.tokens"][:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert found["tokenizer.ggml.tokens"][-2:] == ["[PAD32000]", "[PAD32001]"]
    ids = [found[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")]
    assert ids == [0, 1, 2]
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_space_prefix"]) == (True, True)
    (tmp_path / "ours").mkdir()
    gguf_tokenizer.write(found, tmp_path / "ours", Path("m.gguf"))
    ours, theirs = load_tokenizer(tmp_path / "ours"), load_tokenizer(MIXTRAL_TOKENIZER)
    assert [ours.encode(t, True) for t in TEXTS] == [theirs.encode(t, True) for t in TEXTS]


def test_sentencepiece_scores_and_types_are_the_models_own(tmp_path):
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(MIXTRAL_TOKENIZER))
    found = vocabulary(sentencepiece_folder(tmp_path / "theirs"), 32000)
    assert found["tokenizer.ggml.scores"] == [model.get_score(i) for i in range(32000)]
    types, kinds = found["tokenizer.ggml.token_type"], gguf.TokenType
    assert (types[0], types[1], types[3], types[300]) == (kinds.UNKNOWN, kinds.CONTROL, kinds.BYTE, kinds.NORMAL)


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3 = WORDS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(expression: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("steps", "ignores", "name"),
    [
        ([{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}], False, "smollm"),
        ([split(LLAMA3), BYTES], True, "llama-bpe"),
        ([split(LLAMA3.replace("{1,3}", "")), BYTES], False, "qwen2"),
        ([split(LLAMA3), BYTES], False, None),
        ([split(r"\w+"), BYTES], False, None),
        ([split(LLAMA3)], True, None),
        ([BYTES | {"use_regex": True, "add_prefix_space": True}], False, None),
    ],
)
def test_how_a_text_is_cut_has_llama_cpps_name_or_is_refused(tmp_path, steps, ignores, name):
    folder = byte_level_folder(tmp_path / "t")
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    whole["model"]["ignore_merges"] = ignores
    make.write_json(folder / "tokenizer.json", whole)
    if name is not None:
        assert vocabulary(folder, V)["tokenizer.ggml.pre"] == name
        return
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: pre_tokenizer: llama\.cpp has no name that we know"):
        vocabulary(folder, V)
