"""Describe a tokenizer as the metadata of a GGUF file, as llama.cpp's own converter does.

SentencePiece's pieces, scores and types are written as they are; a tokenizer.json in SentencePiece's manner gets scores
that put its merges in their order. Byte-level BPE is written as tokens and merges. llama.cpp knows how it cuts a text
into words by a name alone, so a tokenizer.json whose expressions have no such name is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accessory.convert.gguf_tokenizer import BYTE, CONTROL, GPT2, NORMAL, PRE, UNKNOWN, UNUSED, USER_DEFINED
from accessory.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from accessory.errors import CheckpointError

_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0


def vocabulary(folder: Path, rows: int) -> dict[str, Any]:
    """The metadata of the tokenizer in `folder`, for an embedding of `rows` rows: those beyond its ids are padding.

    Raises CheckpointError for no tokenizer, a broken one, or one that llama.cpp does not know, and ConfigError for one
    of more ids than rows.
    """
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, rows)
    out = _sentencepiece(tokenizer, rows) if tokenizer.kind == "sentencepiece" else _huggingface(tokenizer, rows)
    tokens: list[str] = out["tokenizer.ggml.tokens"]
    number = {token: i for i, token in reversed(list(enumerate(tokens)))}
    names = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    for name, key in (("unknown", "unk_token"), ("padding", "pad_token")):
        names[name] = number.get(tokenizer.template_variables.get(key, ""))
    if names["unknown"] is None:
        names["unknown"] = next((i for i, t in enumerate(out["tokenizer.ggml.token_type"]) if t == UNKNOWN), None)
    ends = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    names["eot"] = ends[0] if len(ends) == 1 else None
    out |= {f"tokenizer.ggml.{name}_token_id": i for name, i in names.items() if i is not None}
    out["tokenizer.ggml.add_bos_token"] = tokenizer.add_bos
    if tokenizer.chat_template:
        out["tokenizer.chat_template"] = tokenizer.chat_template
    return out


def _sentencepiece(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(tokenizer.path))
    pieces = model.get_piece_size()
    kinds = ((model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_unused, UNUSED), (model.is_byte, BYTE))
    entries = {
        i: (model.id_to_piece(i), next((kind for is_, kind in kinds if is_(i)), NORMAL), model.get_score(i))
        for i in range(pieces)
    }
    for text, (i, control) in tokenizer.added_tokens.items():
        if i >= pieces:
            entries[i] = (text, CONTROL if control else USER_DEFINED, _ADDED_SCORE)
    return _spm(tokenizer, entries, rows)


def _huggingface(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    whole = json.loads(tokenizer.path.read_text(encoding="utf-8"))
    model = whole["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(f"{tokenizer.path}: a {model.get('type')} model; GGUF files are written of BPE alone")
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    added = tokenizer.added_tokens
    entries: dict[int, tuple[str, int, float]] = {i: (token, NORMAL, 0.0) for token, i in model["vocab"].items()}
    entries |= {i: (text, CONTROL if control else USER_DEFINED, 0.0) for text, (i, control) in added.items()}
    if model.get("byte_fallback"):
        return _spm(tokenizer, _ranked(whole, entries, merges), rows)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(tokenizer, whole),
        **_listed(entries, rows),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


def _ranked(
    whole: Mapping[str, Any], entries: dict[int, tuple[str, int, float]], merges: Iterable[tuple[str, ...]]
) -> dict[int, tuple[str, int, float]]:
    """Give the tokens of a tokenizer.json in SentencePiece's manner SentencePiece's types, and scores.

    SentencePiece joins the neighbours whose join has the highest score, so the score is the merge's rank.
    """
    rank: dict[str, int] = {}
    for n, pair in enumerate(merges):
        rank.setdefault("".join(pair), n)
    unknown = whole["model"].get("unk_token")
    out = {}
    for i, (token, kind, _) in entries.items():
        score = -float(rank.get(token, len(rank)))
        if token == unknown:
            out[i] = (token, UNKNOWN, 0.0)
        elif kind != NORMAL:
            out[i] = (token, kind, _ADDED_SCORE)
        else:
            out[i] = (token, BYTE, 0.0) if _BYTE_PIECE.fullmatch(token) else (token, NORMAL, score)
    return out


def _spm(tokenizer: Tokenizer, entries: Mapping[int, tuple[str, int, float]], rows: int) -> dict[str, Any]:
    listed = _listed(entries, rows)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        **listed,
        "tokenizer.ggml.scores": [entries[i][2] if i in entries else _PADDING_SCORE for i in range(rows)],
        "tokenizer.ggml.add_space_prefix": _puts_space(tokenizer),
    }


def _listed(entries: Mapping[int, tuple[str, int, float]], rows: int) -> dict[str, Any]:
    return {
        "tokenizer.ggml.tokens": [entries[i][0] if i in entries else f"[PAD{i}]" for i in range(rows)],
        "tokenizer.ggml.token_type": [entries[i][1] if i in entries else UNUSED for i in range(rows)],
    }


def _puts_space(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts a space before the first word."""
    return tokenizer.encode("a", False) != tokenizer.encode("a", False, prefix=False)


def _pre_tokenizer(tokenizer: Tokenizer, whole: Mapping[str, Any]) -> str:
    """The name by which llama.cpp knows how this byte-level BPE cuts a text into words."""
    step = whole.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    given = [_expression(step) for step in steps]
    found = tuple(expression for expression in given if expression)
    ignores = bool(whole["model"].get("ignore_merges"))
    byte_level = any(step.get("type") == "ByteLevel" for step in steps)
    if byte_level and None not in given and not _puts_space(tokenizer) and not _changes(whole.get("normalizer")):
        for name, (expressions, ignore_merges, _) in PRE.items():
            if (expressions, ignore_merges) == (found, ignores):
                return name
    raise CheckpointError(
        f"{tokenizer.path}: pre_tokenizer: llama.cpp has no name that we know for this way to cut a text into words; "
        "known are those of GPT-2, SmolLM, Llama 3, Qwen 2 and Tekken"
    )


def _expression(step: Mapping[str, Any]) -> str | None:
    """The regular expression by which a step of a pre-tokenizer cuts; "" if it cuts nothing, None if we know none."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return GPT2 if step.get("use_regex", True) else ""
    if kind == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step.get("pattern", {}).get("Regex")
    return None


def _changes(normalizer: Mapping[str, Any] | None) -> bool:
    """Whether a normalizer does what llama.cpp does not do. It leaves out NFC, which changes few texts."""
    return normalizer is not None and normalizer.get("type") != "NFC"
