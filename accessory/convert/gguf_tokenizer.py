"""Write the tokenizer of a GGUF file as the files that other programs read.

Byte-level BPE becomes a Hugging Face tokenizer.json. A SentencePiece vocabulary becomes a tokenizer.model: GGUF stores
exactly what SentencePiece's protobuf stores (pieces, scores, types), so SentencePiece gives the original ids.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accessory.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# tokenizer.ggml.pre -> regular expressions that split the text, applied in order; whether a word that is a token skips
# the merges; whether BOS is put in front if the file does not say.
PRE: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        ((r"\p{N}", GPT2), False, False),
    ),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), ((GPT2,), False, False)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), ((_LLAMA3,), True, True)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), ((_QWEN2,), False, False)),
    "tekken": ((_TEKKEN,), True, True),
    "default": (_DEFAULT, False, False),
}


def write(metadata: Mapping[str, Any], folder: Path, origin: Path) -> list[Path]:
    """Write tokenizer.json or tokenizer.model, with tokenizer_config.json and generation_config.json, into `folder`.

    Returns their paths. Raises CheckpointError naming the key of the metadata if it describes no tokenizer we know.
    """
    tokens, types = _vocabulary(metadata, origin)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        main, tokenizer_class = folder / "tokenizer.json", "PreTrainedTokenizerFast"
        add_bos = _write_bpe(metadata, tokens, types, main, origin)
    elif kind == "llama":
        main, tokenizer_class = folder / "tokenizer.model", "LlamaTokenizer"
        add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", True))
        main.write_bytes(_sentencepiece_model(metadata, tokens, types, origin))
        _check_sentencepiece(main, len(tokens), origin)
    else:
        raise CheckpointError(f"{origin}: tokenizer.ggml.model is {kind!r}; readable are 'gpt2' (BPE) and 'llama'")
    config = {
        "tokenizer_class": tokenizer_class,
        "add_bos_token": add_bos,
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get("llama.context_length"),
        **_special_tokens(metadata, tokens),
        "added_tokens_decoder": _added_tokens(tokens, types),
    }
    if kind == "llama":
        config["legacy"] = False
        config["add_prefix_space"] = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    files = [main, folder / "tokenizer_config.json", folder / "generation_config.json"]
    files[1].write_text(_json(config), encoding="utf-8")
    files[2].write_text(_json(_generation_config(metadata)), encoding="utf-8")
    return files


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _vocabulary(metadata: Mapping[str, Any], origin: Path) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError(f"{origin}: tokenizer.ggml.tokens is missing: the file has no tokenizer")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointError(f"{origin}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    return tokens, types


def _id(metadata: Mapping[str, Any], name: str, tokens: list[str]) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return value if isinstance(value, int) and 0 <= value < len(tokens) else None


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: _id(metadata, key, tokens) for name, key in names.items()}
    return {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}


def _added_tokens(tokens: list[str], types: list[int]) -> dict[str, dict[str, Any]]:
    return {
        str(i): {
            "content": tokens[i],
            "special": kind in (CONTROL, UNKNOWN),
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for i, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    }


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Which ids begin and end a text; eot and eom end a turn."""
    config: dict[str, Any] = {}
    if (bos := metadata.get("tokenizer.ggml.bos_token_id")) is not None:
        config["bos_token_id"] = bos
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if ends := list(dict.fromkeys(i for i in ends if i is not None)):
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if (pad := metadata.get("tokenizer.ggml.padding_token_id")) is not None:
        config["pad_token_id"] = pad
    return config


def _write_bpe(metadata: Mapping[str, Any], tokens: list[str], types: list[int], path: Path, origin: Path) -> bool:
    """Write tokenizer.json of a byte-level BPE; return whether it puts BOS in front."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE:
        raise CheckpointError(f"{origin}: tokenizer.ggml.pre is {pre!r}; known are {', '.join(sorted(PRE))}")
    expressions, ignore_merges, bos_by_default = PRE[pre]
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    if broken := next((merge for merge in merges if len(merge) != 2), None):
        raise CheckpointError(f"{origin}: tokenizer.ggml.merges: {' '.join(broken)!r} is not a pair")
    try:
        model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=ignore_merges)
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{origin}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens ({error})") from error
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for kind in (CONTROL, UNKNOWN, USER_DEFINED):
        own = [t for t, k in zip(tokens, types, strict=True) if k == kind]
        tokenizer.add_tokens([AddedToken(t, special=kind != USER_DEFINED, normalized=False) for t in own])
    bos, eos = _id(metadata, "bos", tokens), _id(metadata, "eos", tokens)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", bos_by_default)) and bos is not None
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and eos is not None
    if add_bos or add_eos:
        ends = [(tokens[i], i) for i, wanted in ((bos, add_bos), (eos, add_eos)) if wanted and i is not None]
        text = [token for token, _ in ends[: int(add_bos)]] + ["{}"] + [token for token, _ in ends[int(add_bos) :]]
        single = " ".join(text).format("$A")
        pair = single + " " + " ".join(f"{part}:1" for part in " ".join(text).format("$B").split(" "))
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    tokenizer.save(str(path))
    return add_bos


def _sentencepiece_model(metadata: Mapping[str, Any], tokens: list[str], types: list[int], origin: Path) -> bytes:
    """Serialise SentencePiece's ModelProto; the numbers are field numbers of sentencepiece_model.proto."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        given = len(scores) if isinstance(scores, list) else "no"
        raise CheckpointError(f"{origin}: tokenizer.ggml.scores has {given} entries for {len(tokens)} tokens")
    pieces = b"".join(
        _field(1, _field(1, token.encode()) + _field(2, float(score)) + _field(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    ids = {name: _id(metadata, key, tokens) for name, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"))}
    bpe = 2
    trainer = _field(3, bpe) + _field(4, len(tokens)) + _field(35, int(BYTE in types))
    for number, name in ((40, "unk"), (41, "bos"), (42, "eos")):
        i = ids[name]
        trainer += _field(number, -1 if i is None else i)
        if i is not None:
            trainer += _field(number + 5, tokens[i].encode())
    trainer += _field(43, -1)
    normalizer = _field(1, b"identity") + _field(2, bytes(metadata.get("tokenizer.ggml.precompiled_charsmap", b"")))
    normalizer += _field(3, int(metadata.get("tokenizer.ggml.add_space_prefix", True)))
    normalizer += _field(4, int(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False))) + _field(5, 1)
    return pieces + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | float | bytes) -> bytes:
    """One protobuf field: a varint, a 32-bit float, or bytes."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value & (2**64 - 1))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _check_sentencepiece(path: Path, size: int, origin: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    try:
        found = SentencePieceProcessor(model_file=str(path)).vocab_size()
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"{origin}: tokenizer.ggml.tokens: SentencePiece refuses them ({reason})") from error
    if found != size:
        raise CheckpointError(f"{origin}: tokenizer.ggml.tokens: SentencePiece read {found} of {size} pieces")
