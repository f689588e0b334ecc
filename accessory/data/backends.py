"""The two kinds of tokenizer behind one small protocol: text to ids, and each id to the bytes it stands for.

Ids are decoded to bytes, which makes streaming exact. The text of a sequence is its tokens' bytes one after the other,
read as UTF-8. That holds for byte-fallback pieces (SentencePiece) and for byte-level BPE (Hugging Face).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from accessory.data.tokenizer_files import Settings
from accessory.errors import CheckpointError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Backend(Protocol):
    size: int  # highest id + 1
    control: dict[str, int]  # strings that are control tokens, and their ids
    added: dict[int, tuple[str, bool]]  # id → string, whether it is a control token; of tokens beside the vocabulary
    bos_id: int | None
    eos_id: int | None
    add_bos: bool  # whether the tokenizer itself begins a text with BOS

    def plain(self, text: str, prefix: bool) -> list[int]:
        """The ids of a text in which control strings are mere characters.

        prefix: the text opens a sequence, so a tokenizer that puts a space before the first word does it here. Without
        it, the text continues a sequence.
        """

    def parsed(self, text: str, prefix: bool) -> list[int]:
        """As `plain`, but control strings become their ids. Hugging Face reads a rendered chat template this way."""

    def piece(self, token: int) -> bytes:
        """The bytes that a token adds to a text; none for control tokens and for ids that stand for nothing."""

    def first_piece(self, token: int) -> bytes:
        """The bytes of a token that opens a text. Encoding puts a space before the first word; it is left out here."""


def _split_on(strings: Iterable[str]) -> Callable[[str], list[str]]:
    """A function that cuts text at any of `strings`, keeping them: text, string, text, string, …, text."""
    longest_first = sorted(filter(None, strings), key=len, reverse=True)
    if not longest_first:
        return lambda text: [text]
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split


class SentencePieceBackend:
    """A SentencePiece model, with the tokens that a Hugging Face folder adds behind its last piece."""

    def __init__(self, path: Path, settings: Settings) -> None:
        try:
            self._model_bytes = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        self._path = path
        self._processor = self._load(self._model_bytes)
        self._continuing: Any = None  # the same model without the space before the first word; made on first use
        pieces = self._processor.get_piece_size()
        added = {text: entry for text, entry in settings.added.items() if entry[0] >= pieces}
        self.added = {number: (text, control) for text, (number, control) in added.items()}
        self._added_ids = {text: number for number, (text, _) in self.added.items()}
        self.size = max([pieces - 1, *self.added]) + 1
        self.control = {self._processor.id_to_piece(i): i for i in range(pieces) if self._processor.is_control(i)} | {
            text: number for text, (number, control) in added.items() if control
        }
        self._split_plain = _split_on(text for text, (_, control) in added.items() if not control)
        self._split_parsed = _split_on([*self.control, *self._added_ids])
        self._all_ids = self.control | self._added_ids
        self._legacy = settings.legacy
        self.bos_id = self._named(settings.bos_token, self._processor.bos_id())
        self.eos_id = self._named(settings.eos_token, self._processor.eos_id())
        self.add_bos = settings.add_bos is not False
        self._strips = self._processor.encode("a", out_type=str)[:1] != ["a"]

    def _named(self, text: str | None, otherwise: int) -> int | None:
        if text is not None and text in self._all_ids:
            return self._all_ids[text]
        return otherwise if otherwise >= 0 else None

    def _load(self, model_bytes: bytes) -> Any:
        from sentencepiece import SentencePieceProcessor

        try:
            if not model_bytes:
                raise RuntimeError("empty")
            return SentencePieceProcessor(model_proto=model_bytes)
        except RuntimeError as error:
            raise CheckpointError(
                f"{self._path}: not a SentencePiece model, or not a whole one ({len(model_bytes)} bytes)"
            ) from error

    def plain(self, text: str, prefix: bool) -> list[int]:
        return self._segments(self._split_plain(text), prefix)

    def parsed(self, text: str, prefix: bool) -> list[int]:
        return self._segments(self._split_parsed(text), prefix, after_control=self._legacy, tidy=True)

    def _segments(self, parts: list[str], prefix: bool, after_control: bool = False, tidy: bool = False) -> list[int]:
        """Encode text, token, text, …

        after_control: put the first word's space behind a control token too. tidy: put none before a text that begins
        with a space.
        """
        ids: list[int] = []
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self._all_ids[part])
            elif part:
                space = (prefix if index == 0 or not any(parts[:index]) else after_control) and not (
                    tidy and part.startswith(" ")
                )
                ids += self._encode(part, space)
        return ids

    def _encode(self, text: str, prefix: bool) -> list[int]:
        if prefix or not self._strips:
            return self._processor.encode(text)
        if self._continuing is None:
            # Protocol buffers merge when concatenated. These bytes set normalizer_spec.add_dummy_prefix = false.
            self._continuing = self._load(self._model_bytes + b"\x1a\x02\x18\x00")
        return self._continuing.encode(text)

    def piece(self, token: int) -> bytes:
        if token in self.added:
            text, control = self.added[token]
            return b"" if control else text.encode()
        processor = self._processor
        if not 0 <= token < processor.get_piece_size() or processor.is_control(token):
            return b""
        if processor.is_unknown(token):
            return processor.decode([token]).encode()
        text = processor.id_to_piece(token)
        if processor.is_byte(token):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()

    def first_piece(self, token: int) -> bytes:
        piece = self.piece(token)
        whole_word = self._strips and token not in self.added and piece.startswith(b" ")
        if whole_word and not self._processor.is_byte(token) and not self._processor.is_unknown(token):
            return piece[1:]
        return piece


class HuggingFaceBackend:
    """A `tokenizer.json`, read by the `tokenizers` package."""

    def __init__(self, path: Path, settings: Settings) -> None:
        try:
            self._json = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not a tokenizer.json (not even text)") from error
        self._path = path
        self._spaces = True  # whether a space is put before the first word
        self._variants: dict[tuple[bool, bool], Any] = {}
        tokenizer = self._tokenizer = self._variant(parse=False, prefix=True)
        steps = _state(tokenizer.normalizer) + _state(tokenizer.pre_tokenizer)
        self._spaces = any(word in steps for word in ('"Prepend"', '"Metaspace"', '"add_prefix_space":true'))
        added = tokenizer.get_added_tokens_decoder()
        self.added = {number: (token.content, token.special) for number, token in added.items()}
        self.control = {content: number for number, (content, special) in self.added.items() if special}
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_id = self._id_of(settings.eos_token, *settings.eos_ids, "</s>", "<|im_end|>", "<|endoftext|>", "<eos>")
        self.bos_id = self._id_of(settings.bos_token, settings.bos_id, "<s>", "<|begin_of_text|>", "<bos>")
        for text in filter(None, (settings.bos_token, settings.eos_token)):
            number = tokenizer.token_to_id(text)
            if number is not None and number not in self.added:  # only the configuration calls it a token
                self.added[number], self.control[text] = (text, True), number
        probe = tokenizer.encode("a", add_special_tokens=True).ids
        begins = self.bos_id is not None and probe[:1] == [self.bos_id]
        self.add_bos = begins if settings.add_bos is None else settings.add_bos
        decoder = _state(tokenizer.decoder)
        self._byte_level = '"ByteLevel"' in decoder
        self._byte_fallback = '"ByteFallback"' in decoder
        self._byte_of = _byte_level_alphabet() if self._byte_level else {}
        self._anchor = self.plain("a", True)[:1]

    def _id_of(self, *candidates: str | int | None) -> int | None:
        for candidate in candidates:
            number = self._tokenizer.token_to_id(candidate) if isinstance(candidate, str) else candidate
            if number is not None and 0 <= number < self.size:
                return number
        return None

    def _variant(self, parse: bool, prefix: bool) -> Any:
        """A tokenizer for each way of reading.

        One alone would have to switch its `encode_special_tokens` back and forth. In a server with threads, one
        request's setting would then reach another request's text.
        """
        key = (parse, prefix or not self._spaces)
        if key not in self._variants:
            from tokenizers import Tokenizer

            try:
                reader = Tokenizer.from_str(self._json if key[1] else _without_first_space(self._json))
            except Exception as error:  # the package raises no narrower class
                raise CheckpointError(f"{self._path}: not a tokenizer.json ({error})") from error
            reader.no_truncation()
            reader.no_padding()
            reader.encode_special_tokens = not parse
            self._variants[key] = reader
        return self._variants[key]

    def plain(self, text: str, prefix: bool) -> list[int]:
        return self._variant(False, prefix).encode(text, add_special_tokens=False).ids

    def parsed(self, text: str, prefix: bool) -> list[int]:
        return self._variant(True, prefix).encode(text, add_special_tokens=False).ids

    def piece(self, token: int) -> bytes:
        return self._bytes(token, self._anchor)

    def first_piece(self, token: int) -> bytes:
        return self._bytes(token, [])

    def _bytes(self, token: int, before: list[int]) -> bytes:
        if token in self.added:
            content, control = self.added[token]
            return b"" if control else content.encode()
        text = self._tokenizer.id_to_token(token) if 0 <= token < self.size else None
        if text is None:
            return b""
        if self._byte_level:
            known = [self._byte_of.get(character) for character in text]
            return text.encode() if None in known else bytes(b for b in known if b is not None)
        if self._byte_fallback and (found := _BYTE_PIECE.fullmatch(text)):
            return bytes([int(found[1], 16)])
        whole = self._tokenizer.decode([*before, token])
        return whole.removeprefix(self._tokenizer.decode(before)).encode() if before else whole.encode()


def _state(step: Any) -> str:
    """The JSON of one step of a tokenizer."""
    return "" if step is None else step.__getstate__().decode()


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE's character for each byte, as a map from character to byte.

    A printable byte is written as itself, any other as the next free character from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _without_first_space(text: str) -> str:
    """The same tokenizer.json, changed so that it puts no space before the first word."""

    def clean(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        kind = node.get("type")
        if kind == "Prepend":
            return None
        if kind == "Metaspace":
            return {key: v for key, v in node.items() if key != "add_prefix_space"} | {"prepend_scheme": "never"}
        if kind == "ByteLevel":
            return node | {"add_prefix_space": False}
        for key in ("normalizers", "pretokenizers"):
            if key in node:
                return node | {key: [kept for inner in node[key] if (kept := clean(inner)) is not None]}
        return node

    whole = json.loads(text)
    return json.dumps(whole | {key: clean(whole.get(key)) for key in ("normalizer", "pre_tokenizer")})
